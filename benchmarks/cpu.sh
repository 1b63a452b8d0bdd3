#!/bin/sh
# All that docs/performance.md tells of one processor, in one go, in about half an hour on two cores:
#     sh benchmarks/cpu.sh FOLDER
# FOLDER gets a JSON file for each table, what `mctf export` printed, and tables.md.
# A table that FOLDER has already is not measured again.
set -eu
out=$1
here=$(dirname "$0")
mkdir -p "$out"

measure() { # NAME BATCH_SIZES ROUNDS OPTION… MODEL…
    name=$1 batches=$2 rounds=$3
    shift 3
    [ -e "$out/$name.json" ] || mctf benchmark "$@" --batch_sizes "$batches" --rounds "$rounds" \
        --output "$out/$name.json"
}

equal="deit_s,r=auto:0.56 deit_s,r=auto:0.56,one_step_ahead=present deit_s,reduction=tome,r=auto:0.56"
fast="deit_s,r=0.35,fusion_layers=[3,6,9]"

measure batch_1 1 40 deit_s deit_s,r=16,sliced deit_s,r=16 $fast $equal
measure batch_16 16 11 deit_s deit_s,r=16,sliced deit_s,r=16 $fast $equal
measure batch_64 64 5 deit_s deit_s,slice=16 deit_s,r=16 $fast $equal
measure bfloat16 1,16 20 --dtype bfloat16 deit_s deit_s,attn_implementation=eager deit_s,r=16,sliced \
    deit_s,r=16 deit_s,r=16,one_step_ahead=present deit_s,reduction=tome,r=13
measure deit_t 1,16 20 deit_t deit_t,r=16,sliced deit_t,r=16 "deit_t,r=0.35,fusion_layers=[3,6,9]"
measure deit_b 1,16 7 deit_b deit_b,r=16,sliced deit_b,r=16 "deit_b,r=0.35,fusion_layers=[3,6,9]"
for model in dinov2_s clip_b_32 clip_b_16 siglip_b_16; do
    measure $model 1,16 7 $model $model,r=auto:0.56
done
for size in 384 512 1024; do
    rounds=$((size < 1000 ? 7 : 3))
    measure image_$size 1 $rounds --image_size $size deit_s deit_s,r=auto:0.56,sliced \
        deit_s,r=auto:0.56 deit_s,r=auto:0.56,one_step_ahead=present
done
measure methods 1,16 7 deit_s deit_s,r=auto:0.67 deit_s,reduction=tome,r=auto:0.67 \
    deit_s,reduction=evit,keep_rate=auto:0.67 deit_s,reduction=token_mergence,keep_rate=auto:0.67 \
    "deit_s,reduction=token_mergence,multi_scale=[2],keep_rate=0.7"
for fused in t2t_vit_t_14,r=13 t2t_vit_t_19,r=9 t2t_vit_14,r=13 lv_vit_s,r=12; do
    measure ${fused%,*} 16 5 ${fused%,*},r=0 $fused
done
for batch in 1 16; do
    measure compiled_$batch $batch 15 deit_s,compile deit_s,r=16,compile
done
measure ahead_of_time 1,16 11 deit_s deit_s,aot deit_s,r=16,aot deit_s,r=16,one_step_ahead=present,aot
[ -e "$out/onnx.txt" ] || { mctf export deit_s,r=16 --output "$out/deit_s.onnx" --count 3 --speed true \
    > "$out/onnx.part" && mv "$out/onnx.part" "$out/onnx.txt" && rm "$out/deit_s.onnx"; }
python "$here/tables.py" "$out" > "$out/tables.md"
