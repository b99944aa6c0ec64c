import base64

import pytest

from opt_jax.evaluation.media import Media

PNG = b"\x89PNG\r\n\x1a\n" + bytes(92)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "inside"
    root.mkdir()
    for path in (root / "a.png", tmp_path / "outside.png"):
        path.write_bytes(PNG)
    (root / "fake.png").write_bytes(b"<svg onload='alert(1)'>")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    return root


def test_a_picture_becomes_a_data_uri(root):
    assert Media(root).inline("a.png", "image") == {
        "uri": "data:image/png;base64," + base64.b64encode(PNG).decode()
    }


@pytest.mark.parametrize(
    ("path", "kind", "problem"),
    [
        ("../outside.png", "image", "outside"),
        ("link.png", "image", "outside"),
        ("/etc/hostname", "image", "outside"),
        ("none.png", "image", "no such file"),
        (".", "image", "no such file"),
        ("fake.png", "image", "not image/png"),
        ("a.png", "audio", "not audio/mpeg or audio/wav"),
        (None, "image", "not a path"),
        ("a\0.png", "image", "not a path"),
    ],
)
def test_anything_else_is_not_shown(root, path, kind, problem):
    shown = Media(root).inline(path, kind)
    assert shown.keys() == {"problem"} and problem in shown["problem"]


def test_sizes_are_limited_per_file_and_in_all(root):
    assert "over 99" in Media(root, max_file_bytes=99).inline("a.png", "image")["problem"]
    media = Media(root, max_total_bytes=250)
    assert ["uri" in media.inline("a.png", "image") for _ in range(3)] == [True, True, False]
