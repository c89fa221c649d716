# Sourced by the recipes: runs their parts, and keeps those that are finished in $out.

once() { # once NAME COMMAND...: run a part, unless the same command has finished it
  local done=$out/$1.done wanted=${*:2}
  if [ ! -e "$done" ]; then
    "${@:2}" && echo "$wanted" >"$done"
  elif [ -s "$done" ] && [ "$(<"$done")" != "$wanted" ]; then # empty: of an earlier version
    printf '%s\n' "error: $done: this part was made with other settings:" "  $(<"$done")" \
      "now: $wanted" "Give the same settings, or name another folder with OUT." >&2
    return 1
  fi
}
mkdir -p "$out"
