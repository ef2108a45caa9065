# shellcheck shell=bash
#
# Shared by the job scripts; sourced, never run.
#
#   tft_keep_logs DIR NAME   show this task's Slurm logs as DIR/NAME.out and .err
#   tft_activate             activate the virtual environment, or say what is missing
#
#   variable   default  meaning
#   TFT_ENV    .env     virtual environment, as `make setup` makes it

# One line that says what and how to mend it, and the end of the task.
tft_fail() {
    echo "[$(date '+%F %T')] error: $*" >&2
    exit 2
}

# Slurm opens a task's logs before any command runs, and older versions create no
# folders: it opens them in outputs/torchft/.slurm, and here they get a second name
# (hard link, or symbolic where the file system has none) in the run's own folder.
# Appending after a requeue goes to the same file.
tft_keep_logs() {
    local folder=$1 name=$2 fd stream target
    mkdir -p "$folder" || tft_fail "cannot create $folder: check that the file system is writable"
    for stream in out err; do
        [ "$stream" = out ] && fd=1 || fd=2
        target=$(readlink -f "/proc/$$/fd/$fd") || continue
        [ -f "$target" ] || continue # not a file: a terminal, a pipe, /dev/null
        [ "$target" -ef "$folder/$name.$stream" ] && continue
        ln "$target" "$folder/$name.$stream" 2>/dev/null ||
            ln -sf "$target" "$folder/$name.$stream" ||
            echo "log stays at $target: it could not be linked into $folder" >&2
    done
}

tft_activate() {
    local environment=${TFT_ENV:-.env}
    [ -f "$environment/bin/activate" ] ||
        tft_fail "no virtual environment at $environment: run 'make setup' on the login node, or set TFT_ENV"
    # shellcheck disable=SC1091
    source "$environment/bin/activate"
}
