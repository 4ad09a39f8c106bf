#!/usr/bin/env bash
# MT as continued pre-training, the whole chain, two single-threaded jobs at a time. Resumable: start it again, and what
# is done is skipped, what was interrupted resumes. From the repository's root:
#
#   DATA=path/to/data OUT=build/continued-pretraining bash recipes/results/continued-pretraining/run.sh
#
# DATA holds bible, sib200, tatoeba, multi30k, ud_ewt and ud_pud. PYTHON is the interpreter; DRY=1 runs every command on
# next to nothing. A job whose settings change is done again once its file in $OUT/done is removed.
set -u
export DATA=${DATA:?the directory of the corpora} DRY=${DRY:-}
export OUT=${OUT:-build/continued-pretraining${DRY:+-dry}}
export PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 RAYON_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false ACCELERATE_USE_CPU=true
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$OUT/cache
SEEDS="0 1 2"
C=recipes/configs
TEXT=$OUT/text/monolingual PARALLEL=$OUT/text/parallel
FILES="--train_file $PARALLEL/train.parquet --validation_file $PARALLEL/validation.parquet --test_file $PARALLEL/test.parquet"
SOURCE=$OUT/denoised/model

# next to nothing
STEPS= HELD_OUT= FEW_ITEMS= FEW_SENTENCES=
if [ -n "$DRY" ]; then
    STEPS="--max_steps 3 --eval_steps 3 --logging_steps 1 --max_sentences 400"
    HELD_OUT="--max_held_out 20"
    FEW_ITEMS="--seeds 1 --probing_epochs 1 --fine_tuning_epochs 1 --max_train_examples 32 --max_test_items 20"
    FEW_SENTENCES="--max_sentences 30"
fi

recipe() { "$PYTHON" "recipes/$1.py" "${@:2}"; }
continued() { # name, further options
    recipe continue_pretraining --config "$C/continue_pretraining/small.yaml" --model_name_or_path "$SOURCE" $FILES \
        --disable_tqdm true --output_dir "$OUT/$1" "${@:2}" $STEPS
}
claim() { # source, two conditions of three seeds
    echo "source=$SOURCE"
    for s in $SEEDS; do echo "cp_mt=$OUT/cp-mt-$s/model"; done
    for s in $SEEDS; do echo "cp_denoise=$OUT/cp-denoise-$s/model"; done
}
models() { # and the source's spectrum put back into both
    claim
    for s in $SEEDS; do echo "cp_mt_source_spectrum=$OUT/restored-mt-$s/model"; done
    for s in $SEEDS; do echo "cp_denoise_source_spectrum=$OUT/restored-denoise-$s/model"; done
}
transfer() { # directory, options
    recipe transfer_cross_lingually --config "$C/transfer_cross_lingually/small.yaml" \
        --config "$C/transfer_cross_lingually/twelve.yaml" --data_dir "$DATA" --output_dir "$OUT/$1" "${@:2}" $FEW_ITEMS
}
representations() { # directory, options
    recipe compare_representations --config "$C/compare_representations/small.yaml" --models $(models) \
        --output_dir "$OUT/$1" "${@:2}" $FEW_SENTENCES
}
FINE_TUNING="--modes fine_tuning --fine_tuning_learning_rate 1e-3 --max_test_items 300"

job() {
    case $1 in
    text) recipe prepare_text --config "$C/prepare_text/small.yaml" --data_dir "$DATA" --output_dir "$OUT/text" $HELD_OUT ;;
    denoised) recipe pretrain --config "$C/pretrain/denoising.yaml" --train_file "$TEXT/train.{lang}" --disable_tqdm true \
        --validation_file "$TEXT/validation.{lang}" --output_dir "$OUT/denoised" $STEPS ;;
    masks) recipe identify --config "$C/identify/continue_pretraining.yaml" --model_name_or_path "$SOURCE" \
        --validation_file "$PARALLEL/validation.parquet" --output_dir "$OUT/masks" ;;
    cp-mt-*) continued "$1" --seed "${1##*-}" ;;
    cp-denoise-*) continued "$1" --seed "${1##*-}" --objective denoising ;;
    cp-masks) continued "$1" --masks "$OUT/masks" ;;
    restored-*) recipe score --config "$C/score/continue_pretraining.yaml" --spectrum_of "$SOURCE" --output_dir "$OUT/$1" \
        --model_name_or_path "$OUT/cp-${1#restored-}/model" --test_file "$PARALLEL/test.parquet" ;;
    probing) transfer probing --models $(models) --modes probing ;;
    fine_tuning) transfer fine_tuning --models $(claim) $FINE_TUNING ;;
    representations-bible) representations "$1" --test_file "$DATA/bible/test.parquet" ;;
    representations-sib200) representations "$1" --test_file "$DATA/sib200/parallel.parquet" ;;
    representations-tokens) representations "$1" --test_file "$DATA/bible/test.parquet" --level tokens --max_sentences 300 ;;
    esac
}
done_once() { # run a job unless it was done
    [ -f "$OUT/done/$1" ] && return 0
    mkdir -p "$OUT/done" "$OUT/logs"
    echo "$(date +%T) start $1"
    local begun=$SECONDS
    if job "$1" > "$OUT/logs/$1.log" 2>&1; then
        echo "$((SECONDS - begun)) s" > "$OUT/done/$1"
        echo "$(date +%T) done  $1 ($((SECONDS - begun)) s)"
    else
        echo "$(date +%T) FAILED $1: $(tail -n 1 "$OUT/logs/$1.log" | tr '\r' '\n' | tail -n 1)"
        return 1
    fi
}
lanes() { printf '%s\n' "$@" | xargs -P 2 -I{} bash "$0" {} || { echo "stopped: a job failed"; exit 1; }; }

if [ $# -eq 1 ]; then done_once "$1"; exit; fi
mkdir -p "$OUT"
lanes text
lanes denoised
lanes masks cp-mt-0 cp-denoise-0 cp-mt-1 cp-denoise-1 cp-mt-2 cp-denoise-2 cp-masks
lanes restored-mt-0 restored-mt-1 restored-mt-2 restored-denoise-0 restored-denoise-1 restored-denoise-2
lanes probing fine_tuning representations-bible representations-sib200 representations-tokens
"$PYTHON" "$(dirname "$0")/collect.py" "$OUT"
for name in probing fine_tuning; do tail -n 60 "$OUT/logs/$name.log"; done
for name in bible sib200 tokens; do echo "representations-$name"; head -n 90 "$OUT/representations-$name/tables.md"; done
echo "$(date +%T) everything is done"
