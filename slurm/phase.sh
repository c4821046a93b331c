# What slurm/*.sbatch share. On the first node of a job: make or find the run directory, then become its script.

cd "$repository" || exit 78
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: slurm/$PHASE.sbatch is a batch script, found no SLURM_JOB_ID. Type: sbatch slurm/$PHASE.sbatch." >&2
    exit 78
fi

# A later start of this job goes on with the run that the first one made, by that run's own script and code, whatever has
# been changed here since. launchers.prepare has left its path in the job's comment.
run=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Comment=encdec run \(.*[^ ]\) *$/\1/p')
if [ -z "$run" ] && [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then  # the comment may have been overwritten since
    script=$(grep -ls "^# Made inside job $SLURM_JOB_ID," "${RUN_DIR:-/dev/null}"{,/*}/submit.sbatch runs/*{,/*}/submit.sbatch | head -n 1)
    run=${script%/submit.sbatch}
fi
if [ -n "$run" ] && grep -qs "^# Made inside job $SLURM_JOB_ID," "$run/submit.sbatch"; then
    exec bash "$run/submit.sbatch"
fi

if [ -n "$VENV" ]; then
    source "$VENV/bin/activate" || exit 78
fi
arguments=(--phase "$PHASE" --config "$CONFIG" --cluster "$CLUSTER" --nodes "$SLURM_JOB_NUM_NODES")
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || arguments+=(--gpus-per-node "$SLURM_GPUS_ON_NODE")
[ -z "$RUN_DIR" ] || arguments+=(--run-dir "$RUN_DIR")
[ -z "$RUN_NAME" ] || arguments+=(--name "$RUN_NAME")
for setting in "${SETTINGS[@]}"; do
    arguments+=(--set "$setting")
done
run=$(python -m launchers.prepare "${arguments[@]}" "$@") || exit
[ -n "$run" ] || exit 0  # complete: nothing left to do
exec bash "$run/submit.sbatch"
