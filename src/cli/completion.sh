# Tab completion of python -m src.train and python -m src.tune, in bash and zsh: source src/cli/completion.sh
# Hydra knows what there is: groups, options, keys, values.
if [ -n "$ZSH_VERSION" ]; then
    autoload -Uz compinit bashcompinit
    compinit -u
    bashcompinit
fi

_src_train() {
    local line="${COMP_LINE:0:$COMP_POINT}" python flag module others
    read -r python flag module others <<< "$line"
    local rest="${line#*"$module"}" word="${line##* }"
    COMPREPLY=()
    if [[ $flag != -m || $rest != " "* || ( $module != src.train && $module != src.tune ) ]]; then
        return
    fi
    local choices="$(COMP_LINE="python x$rest" "$python" -m "$module" -sc query=bash 2> /dev/null)"
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [ -z "$ZSH_VERSION" ] && [[ $word == *=* ]]; then  # bash replaces what is behind the last =
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
        [ -n "${COMPREPLY[*]}" ] || COMPREPLY=($(compgen -f -- "${word##*=}"))
    fi
}
complete -o nospace -o default -F _src_train python python3
