
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Also completes the commands that only the device at the typed socket has.
_vhost_device_ctl_with_device() {
    _vhost__device__ctl "$@"
    local word words=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -* ]] || words+=("$word")
    done
    if [[ ${#words[@]} -eq 1 && -S ${words[0]} ]]; then
        # Each command starts a line; what describes it is indented.
        local names
        names=$(vhost-device-ctl "${words[0]}" help 2>/dev/null | sed -n 's/^\([^ ][^ ]*\).*/\1/p')
        COMPREPLY=($(compgen -W "${COMPREPLY[*]} $names" -- "${COMP_WORDS[COMP_CWORD]}" | sort -u))
    fi
}
complete -F _vhost_device_ctl_with_device -o bashdefault -o default vhost-device-ctl
