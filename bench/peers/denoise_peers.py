#!/usr/bin/env python3
"""nbhd denoise beside scikit-image's and OpenCV's non-local means, on the same noisy photographs.

    python bench/peers/denoise_peers.py [--nbhd build/nbhd] [--noise 25] [--strength 22] [PHOTO.png ...]

Needs: pip install scikit-image opencv-python-headless. Every method gets the very same 8-bit noisy picture; PSNR is
of the 8-bit result against the photograph. Times are of the method alone, without reading and writing files: by the
clock, and of all processors together, which other work on the machine disturbs less.
scikit-image's exact mode has nbhd's patch, window and strength; OpenCV, whose weights and colour space differ, gets the
best of several strengths. The exact mode takes minutes: that is the point.
"""
import argparse
import json
import os
import subprocess
import tempfile
import time

import cv2
import numpy as np
from skimage.io import imread
from skimage.restoration import denoise_nl_means


def psnr(a, b):
    return -10 * np.log10(np.mean((a.astype(float) - b.astype(float)) ** 2) / 255**2)


def timed(function):
    """The result and (seconds by the clock, seconds of processor time)."""
    begun = time.perf_counter(), time.process_time()
    result = function()
    return result, (time.perf_counter() - begun[0], time.process_time() - begun[1])


def run_nbhd(args, photo, folder, threads=None):
    noisy, out = os.path.join(folder, "noisy.png"), os.path.join(folder, "out.png")
    command = [args.nbhd, "denoise", photo, "-o", out, "--save-noisy", noisy, "--noise", str(args.noise), "--json",
               "--strength", str(args.strength), "--window", str(args.window), "--patch", str(args.patch)]
    if threads:
        command += ["--threads", str(threads)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(args.repeats)]
    best = min(run["ms"] for run in runs) / 1000, min(run["cpu_ms"] for run in runs) / 1000
    return imread(noisy), imread(out), best


def to_bytes(image):
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def run_skimage(args, noisy, fast):
    return timed(lambda: to_bytes(denoise_nl_means(noisy / 255.0, patch_size=args.patch,
                                                   patch_distance=args.window // 2, h=args.strength / 255,
                                                   fast_mode=fast, channel_axis=-1)))


def run_opencv(args, noisy, photo, threads):
    cv2.setNumThreads(threads)
    best = None
    for factor in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        h = factor * args.noise
        out, seconds = timed(lambda: cv2.fastNlMeansDenoisingColored(noisy, None, h, h, args.patch, args.window))
        if best is None or psnr(out, photo) > psnr(best[0], photo):
            best = (out, seconds, h)
    return best


def compare(args, path, folder):
    photo = imread(path)
    noisy, ours, seconds = run_nbhd(args, path, folder)
    _, _, seconds_one = run_nbhd(args, path, folder, threads=1)
    rows = [("nbhd, all threads", ours, seconds), ("nbhd, one thread", ours, seconds_one)]
    for threads, name in ((os.cpu_count(), "all threads"), (1, "one thread")):
        out, cv_seconds, h = run_opencv(args, noisy, photo, threads)
        rows.append((f"OpenCV, h {h:g}, {name}", out, cv_seconds))
    rows.append(("scikit-image, fast mode", *run_skimage(args, noisy, True)))
    if not args.no_exact:
        rows.append(("scikit-image, exact", *run_skimage(args, noisy, False)))
    print(f"{path} {photo.shape[1]}x{photo.shape[0]}, noise {args.noise:g}, noisy {psnr(noisy, photo):.2f} dB, "
          f"window {args.window}, patch {args.patch}, strength {args.strength:g}")
    for name, out, (clock, processor) in rows:
        print(f"  {name:32s} {psnr(out, photo):6.2f} dB  {clock:8.3f} s  {clock / seconds[0]:6.1f} x nbhd's, processor "
              f"{processor:8.3f} s  {processor / seconds_one[1]:6.1f} x nbhd's on one thread", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", default=["data/coffee.png", "data/chelsea.png"])
    parser.add_argument("--nbhd", default="build/nbhd")
    parser.add_argument("--noise", type=float, default=25)
    parser.add_argument("--strength", type=float, default=22)
    parser.add_argument("--window", type=int, default=21)
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-exact", action="store_true", help="leave out scikit-image's exact mode")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for photo in args.photos:
            compare(args, photo, folder)


if __name__ == "__main__":
    main()
