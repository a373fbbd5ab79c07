# What needs libpng: a mask's picture, and nbhd denoise: what it says, that parts change nothing, and that it really
# removes noise.
nbhd mask "d8 9 w3" -o small.png 2>&1 | grep 'built without libpng' && exit 77
head -c 8 small.png | od -An -c
rm small.png
cat=$ROOT/data/chelsea.png
psnr() { sed -n "s/.*\"psnr_$1\": \([0-9.]*\).*/\1/p" "$2"; }
t denoise $cat -o out.png --noise 25 --window 9 --patch 3 --kernel cpu.fwd_scalar --threads 2 |
    sed -E "s#$ROOT/##; s/in [0-9.]+ s/in N s/; s/[0-9.]+ GFLOP/N GFLOP/"
nbhd denoise $cat -o out.png --noise 25 --json >one.json
awk -v b="$(psnr before one.json)" -v a="$(psnr after one.json)" \
    'BEGIN { print (a > b + 9 ? "at least 9 dB better" : "only " a - b " dB better") }'
nbhd denoise $cat -o parts.png --noise 25 --memory 8 --save-noisy noisy.png --json >parts.json
awk -v a="$(psnr after one.json)" -v b="$(psnr after parts.json)" \
    'BEGIN { print (a - b < 0.001 && b - a < 0.001 ? "the same in parts" : a " and in parts " b) }'
nbhd denoise noisy.png -o again.png --clean $cat --strength 22.5 --json >again.json
cmp out.png again.png && echo "the same from the saved noisy picture"
[ "$(psnr after one.json)" = "$(psnr after again.json)" ] && echo "and as far from the clean one"
t denoise noisy.png -o found.png --window 3 --patch 1 --kernel cpu.fwd_scalar --threads 1 |
    sed -E 's/[0-9.]+ (s|GFLOP)/N \1/g'
t denoise noisy.png -o out.png --clean $ROOT/data/coffee.png | sed "s#$ROOT/##g"
t denoise
t denoise noisy.png -o o.jpg
t denoise noisy.png
t denoise nofile.png -o out.png
t denoise again.json -o out.png
t denoise . -o out.png
t denoise noisy.png -o out.png --noise -3
t denoise noisy.png -o out.png --noise 3 --clean noisy.png
t denoise noisy.png -o out.png --save-noisy x.png
t denoise noisy.png -o out.png --patch 4
t denoise noisy.png -o out.png --patch 15
t denoise noisy.png -o out.png --window 3x3x3
t denoise noisy.png -o out.png --strength 0
t denoise noisy.png -o nofolder/out.png --window 3 --patch 1
t denoise noisy.png -o same.png --noise 3 --save-noisy ./same.png
mkdir folder.png
t denoise noisy.png -o folder.png --window 3 --patch 1
name=$(printf 'na\377me\303\251.png')
cp noisy.png "$name"
nbhd denoise "$name" -o out.png --window 3 --patch 1 --json | cut -d, -f1
rm "$name"
head -c 3000 noisy.png >cut.png
t denoise cut.png -o out.png
ls
