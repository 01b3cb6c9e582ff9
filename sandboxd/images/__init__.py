"""Images: root file systems by digest, and the ways to get one.

Theory of operation
-------------------
An image is a directory tree and the digest of what is in it (``tree``). The store keeps each tree
once, under its digest, and a table of names that point at digests::

    <state>/images/
      names.json                    name -> digest, replaced by rename under names.lock
      sha256-<hex>/rootfs/          the tree, never written again
      sha256-<hex>/tree             what the digest is of: one line per file (sandboxd-tree-v1)
      sha256-<hex>/image.json       source, size, architecture; its flock is the image's use count
      host/sha256-<hex>/            the same, for skeletons of ``image: host``
      cache/                        packages that recipes share
      tmp/<random>/                 what is being made; locked by its maker

A tree is made in ``tmp`` by one of three producers: ``build`` (a recipe, by mmdebstrap), ``importer``
(an archive, unpacked by ``unpack``), or ``host``. It is then digested, synced and renamed into place,
so nothing half-made is ever visible; a ``tmp`` entry whose lock is free belongs to a dead process and
is removed. Whoever runs containers of an image holds a shared lock on it (``ImageStore.hold``), and
removal takes the exclusive one.
"""

from __future__ import annotations

from sandboxd.images.image import HostBind, Image
from sandboxd.images.recipe import Recipe, shipped_recipes
from sandboxd.images.store import ImageStore
from sandboxd.images.tarstream import ImportLimits

__all__ = ["HostBind", "Image", "ImageStore", "ImportLimits", "Recipe", "shipped_recipes"]
