# shellcheck shell=bash
# What the other scripts share. Source it: it goes to the root of the checkout.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

# Builds the named images into a state directory, those that are there from the same recipe left alone.
build_images() {
  local state=$1 name recipe stamp digest
  shift
  mkdir -p "$state/recipes"
  for name; do
    recipe=images/$name.yaml
    stamp=$state/recipes/$name
    digest=$(sha256sum <"$recipe")
    if [[ -f $stamp && $(<"$stamp") == "$digest" ]] && has_image "$state" "$name"; then
      continue
    fi
    say "building the image $name into $state"
    .venv/bin/python -c '
import sys
from pathlib import Path
from sandboxd.images import ImageStore
def tell(line): print(f"  {line}", file=sys.stderr, flush=True)
image = ImageStore(Path(sys.argv[1], "images")).build(Path(sys.argv[2]), progress=tell)
tell(f"{image.name} {image.digest}")' "$state" "$recipe" </dev/null \
      || die "the image $name could not be built (its packages come from the suite that $recipe names)"
    printf '%s\n' "$digest" >"$stamp"
  done
}

has_image() {
  .venv/bin/python -c '
import sys
from pathlib import Path
from sandboxd import errors
from sandboxd.images import ImageStore
try: ImageStore(Path(sys.argv[1], "images")).resolve(sys.argv[2])
except errors.Refused: sys.exit(1)' "$1" "$2" </dev/null
}
