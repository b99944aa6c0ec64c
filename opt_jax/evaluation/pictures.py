"""Looks at generated pictures with the detector: does it find the objects that the text names?"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from opt_jax.data.triplet import Triplet
from opt_jax.encoders import dvae, faster_rcnn


def named_objects_found(
    frozen: Mapping, codes: np.ndarray, real_codes: np.ndarray, triplets: Sequence[Triplet]
):
    """How often the detector finds the named objects in pictures decoded from generated codes.

    Args:
      frozen: 'detector' and 'dvae', each (params, config). codes, real_codes: [n, G] generated from the
        captions, and those of the real pictures. triplets: n, with image, classes and named.
    Returns: {'text_to_image/named_objects_found', 'text_to_image/named_objects_ceiling'} in percent of the
      named objects, the ceiling being the same figure on real pictures that went through the dVAE; generated
      and reconstructed pictures uint8. Without named objects in the data (no boxes) the figures are left out.
    """
    pictures = {
        "found": dvae.decode(frozen["dvae"][0], codes),
        "ceiling": dvae.decode(frozen["dvae"][0], real_codes),
    }
    results = {}
    named = [[int(t.classes[i]) for i in t.named] if t.classes is not None else [] for t in triplets]
    if any(named):
        side = triplets[0].image.shape[0]
        for what, images in pictures.items():
            seen = detected_classes(frozen["detector"], enlarged(images, side))
            hits = [wanted in classes for wants, classes in zip(named, seen, strict=True) for wanted in wants]
            results[f"text_to_image/named_objects_{what}"] = 100 * float(np.mean(hits))
    return results, pictures["found"], pictures["ceiling"]


def detected_classes(detector: tuple, images: np.ndarray) -> list[set[int]]:
    """Classes that the detector is confident of, for each picture of uint8 [n, H, W, 3]."""
    params, config = detector
    regions = {name: np.asarray(x) for name, x in faster_rcnn.detect(params, images, config).items()}
    sure = regions["valid"] & (regions["scores"] > config["confidence_threshold"])
    return [set(map(int, classes[keep])) for classes, keep in zip(regions["classes"], sure, strict=True)]


def enlarged(images: np.ndarray, side: int) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] resized to side x side, bicubic."""
    resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])
