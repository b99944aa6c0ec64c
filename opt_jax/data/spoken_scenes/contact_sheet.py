"""A page of pictures with their captions, for people to look at."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_COLUMNS, _ROWS, _SIDE, _TEXT_HEIGHT, _MARGIN = 4, 4, 224, 64, 12


def write_contact_sheet(source, path: Path) -> None:
    """Writes a PNG with the first 16 pictures of a source, each above its caption."""
    cell_width, cell_height = _SIDE + _MARGIN, _SIDE + _TEXT_HEIGHT
    sheet = Image.new("RGB", (_COLUMNS * cell_width + _MARGIN, _ROWS * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index in range(min(_COLUMNS * _ROWS, len(source))):
        sample = source[index]
        x = _MARGIN + (index % _COLUMNS) * cell_width
        y = _MARGIN + (index // _COLUMNS) * cell_height
        sheet.paste(Image.fromarray(sample.image).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + _SIDE + 4), textwrap.fill(sample.caption, 32), fill="black", font=font)
    sheet.save(path)
