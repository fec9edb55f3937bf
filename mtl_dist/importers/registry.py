"""The built-in importers by name, with the line about each in `mtl prepare --help`; nothing is imported."""

from __future__ import annotations

from typing import NamedTuple


class BuiltIn(NamedTuple):
    """An importer's import path, and what it reads in one line."""

    path: str
    summary: str


IMPORTERS = {
    "auto": BuiltIn("mtl_dist.importers.auto.Auto", "Data of a form that is found out, said, and read."),
    "digits": BuiltIn(
        "mtl_dist.importers.digits.Digits", "scikit-learn's 1,797 handwritten digits: nothing to download."
    ),
    "scenes": BuiltIn(
        "mtl_dist.importers.scenes.Scenes", "Made scenes with exact masks, depth and normals: no download."
    ),
    "folders": BuiltIn(
        "mtl_dist.importers.folders.Folders", "One folder per class, in a directory or a zip."
    ),
    "table": BuiltIn("mtl_dist.importers.table.TableImporter", "A table of labels: one row per image."),
    "idx": BuiltIn("mtl_dist.importers.idx.Idx", "MNIST and its relatives: IDX files."),
    "cifar": BuiltIn("mtl_dist.importers.cifar.Cifar", "CIFAR's binary records, with any number of labels."),
    "coco": BuiltIn("mtl_dist.importers.coco.Coco", "COCO's JSON files: instances or panoptic."),
    "voc": BuiltIn("mtl_dist.importers.voc.Voc", "Pascal VOC's XML files of boxes, and its masks."),
    "yolo": BuiltIn(
        "mtl_dist.importers.yolo.Yolo", "YOLO's text files: boxes or polygons in shares of the image."
    ),
    "labelme": BuiltIn(
        "mtl_dist.importers.labelme.LabelMe", "LabelMe's JSON files: polygons and other shapes."
    ),
    "cvat": BuiltIn("mtl_dist.importers.cvat.Cvat", "CVAT's XML for images: polygons and other shapes."),
    "parquet": BuiltIn(
        "mtl_dist.importers.parquet.Parquet", "Parquet or Arrow files with a row per image (Hugging Face)."
    ),
    "mtan": BuiltIn("mtl_dist.importers.mtan.Mtan", "NYUv2 or Cityscapes as MTAN's folders of arrays."),
    "celeba": BuiltIn("mtl_dist.importers.celeba.Celeba", "CelebA's faces: 40 tasks, or one multilabel."),
    "domains": BuiltIn(
        "mtl_dist.importers.domains.Domains", "Office-31, Office-Home: a task for each domain."
    ),
    "tars": BuiltIn(
        "mtl_dist.importers.tars.Tars",
        "WebDataset tars that others wrote, indexed where they are: mtl index.",
    ),
    "stacks": BuiltIn("mtl_dist.importers.stacks.Stacks", "Multi-page TIFFs: one sample per page."),
}
