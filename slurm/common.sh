# shellcheck shell=bash
#
# Shared by the job scripts; sourced, never run.
#
#   tft_keep_logs DIR NAME   show this task's Slurm logs as DIR/NAME.out and .err
#   tft_activate             load modules, activate the virtual environment, or say what is missing
#   tft_run COMMAND…         run a command: in the container, where there is one
#
#   variable             default  meaning
#   TFT_MODULES                   environment modules to load
#   TFT_ENV              .env     virtual environment, as `make setup` makes it
#   TFT_CONTAINER                 Apptainer image to run in, with the environment in it or beside it
#   TFT_CONTAINER_FLAGS  --nv     flags of `apptainer exec`

# One line that says what and how to mend it, and the end of the task.
tft_fail() {
    echo "[$(date '+%F %T')] error: $*" >&2
    exit 2
}

# Slurm opens a task's logs before any command runs, and older versions create no
# folders: it opens them in outputs/torchft/.slurm, and here they get a second name
# (hard link, or symbolic where the file system has none) in the run's own folder.
# Appending after a requeue goes to the same file. Where the run has a log of that
# name already, of another job's task, this one's words are appended to it.
tft_keep_logs() {
    local folder=$1 name=$2 fd stream target
    mkdir -p "$folder" || tft_fail "cannot create $folder: check that the file system is writable"
    for stream in out err; do
        [ "$stream" = out ] && fd=1 || fd=2
        target=$(readlink -f "/proc/$$/fd/$fd") || continue
        [ -f "$target" ] || continue # not a file: a terminal, a pipe, /dev/null
        [ "$target" -ef "$folder/$name.$stream" ] && continue
        if [ -e "$folder/$name.$stream" ]; then
            if [ "$stream" = out ]; then
                exec >>"$folder/$name.out"
            else
                exec 2>>"$folder/$name.err"
            fi
            continue
        fi
        ln "$target" "$folder/$name.$stream" 2>/dev/null ||
            ln -sf "$target" "$folder/$name.$stream" ||
            echo "log stays at $target: it could not be linked into $folder" >&2
    done
}

tft_activate() {
    local environment=${TFT_ENV:-.env} name
    for name in ${TFT_MODULES:-}; do
        command -v module >/dev/null ||
            tft_fail "TFT_MODULES is set, and this node has no 'module' command"
        module load "$name" || tft_fail "module $name cannot be loaded (TFT_MODULES)"
    done
    if [ -n "${TFT_CONTAINER:-}" ]; then
        command -v apptainer >/dev/null ||
            tft_fail "TFT_CONTAINER is set, and this node has no 'apptainer' command"
        [ -e "$TFT_CONTAINER" ] || tft_fail "no container image at $TFT_CONTAINER (TFT_CONTAINER)"
        [ -f "$environment/bin/activate" ] || return 0 # all is in the image
    fi
    [ -f "$environment/bin/activate" ] ||
        tft_fail "no virtual environment at $environment: run 'make setup' on the login node, or set TFT_ENV"
    # shellcheck disable=SC1091
    source "$environment/bin/activate"
}

tft_run() {
    if [ -z "${TFT_CONTAINER:-}" ]; then
        exec "$@"
    fi
    local flags
    read -ra flags <<<"${TFT_CONTAINER_FLAGS:---nv}"
    exec apptainer exec "${flags[@]}" --bind "$PWD" --pwd "$PWD" "$TFT_CONTAINER" "$@"
}
