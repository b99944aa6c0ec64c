"""From pictures, texts and recordings to what the model takes, and from what it gives back to these.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.caption(model, "dog.jpg")
    processor.transcribe(model, "dog.wav")
    processor.draw(model, "a red ball").save("ball.png")
    output = model(**processor(text="a dog", image="dog.jpg"))
    loss = model(**processor(image="dog.jpg"), labels=processor.labels("a dog")).loss
    loss = model(**processor(text="a dog"), image_codes=processor.codes("dog.jpg")).loss

A picture is a file's name, a PIL image or uint8 [H, W, 3]; a recording a file's name or samples [N], with
their `sampling_rate`. Each may be one, or a list of them, then all are lists of the same length. Pictures
need Pillow, and sound files soundfile.

Letters: B rows, T text positions, V regions, A audio positions, F numbers of a feature, N symbols, G codes.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast

from .configuration_opt_jax import IGNORED
from .detector_opt_jax import Detector
from .dvae_opt_jax import DiscreteVAE
from .generation_opt_jax import counted
from .images_opt_jax import as_array, fit_square, pillow, relative_boxes
from .random_opt_jax import gumbel
from .sound_opt_jax import SAMPLE_RATE, Speech, as_waveform

PAIR_CLASS = {"text": 3, "audio": 1}  # class of matching_logits that says "goes with the picture"
NONE_MATCH = 4
SETTINGS = "preprocessor_config.json"
WORDS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ENCODERS = ("detector", "dvae", "wav2vec2")
HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


class OptJaxProcessor:
    """The tokenizer, the frozen encoders, and the settings of preprocessor_config.json.

    Attributes: tokenizer. detector, dvae, speech: modules, read when they are first asked for, None for what
      the folder does not hold. settings: of the file. folder: where all of it is read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in (SETTINGS, *WORDS[:2]):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; name an exported folder")
        self.settings = json.loads((folder / SETTINGS).read_text())
        words = json.loads((folder / "tokenizer_config.json").read_text())
        del words["tokenizer_class"]
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **words)

    @functools.cached_property
    def detector(self) -> Detector | None:
        place = self.folder / "detector"
        return Detector.from_folder(place) if place.is_dir() else None

    @functools.cached_property
    def dvae(self) -> DiscreteVAE | None:
        place = self.folder / "dvae"
        return DiscreteVAE.from_folder(place) if place.is_dir() else None

    @functools.cached_property
    def speech(self) -> Speech | None:
        place, windows = self.folder / "wav2vec2", ("window_seconds", "context_seconds")
        return Speech(place, *(self.settings[name] for name in windows)) if place.is_dir() else None

    @classmethod
    def from_pretrained(cls, folder, **options) -> "OptJaxProcessor":
        """Of an exported folder, or of a model's name on the hub, with HUB_OPTIONS; others have no effect."""
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download  # comes with transformers

            told = {name: options[name] for name in HUB_OPTIONS if name in options}
            folder = snapshot_download(folder, **told)
        return cls(Path(folder))

    def save_pretrained(self, save_directory) -> None:
        """Makes a folder for `from_pretrained`, beside what the model's own `save_pretrained` writes there:
        the settings as they are now; the tokenizer, the encoders and the Python files as they were read."""
        place = Path(save_directory)
        place.mkdir(parents=True, exist_ok=True)
        if place.resolve() != self.folder.resolve():
            files = [self.folder / name for name in WORDS] + sorted(self.folder.glob("*_opt_jax.py"))
            for file in files:
                if file.is_file():
                    shutil.copyfile(file, place / file.name)
            for name in ENCODERS:
                if (self.folder / name).is_dir():
                    shutil.copytree(self.folder / name, place / name, dirs_exist_ok=True)
        (place / SETTINGS).write_text(json.dumps(self.settings, indent=1) + "\n")

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor") -> None:
        """For transformers, which calls it; the files of the model are in the folder already."""

    def to(self, *args) -> "OptJaxProcessor":
        """Moves the frozen encoders to a device, or to a dtype."""
        for module in (self.detector, self.dvae, self.speech):
            if module is not None:
                module.to(*args)
        return self

    # --- to the model --------------------------------------------------------------------------------------

    def __call__(
        self,
        text=None,
        image=None,
        audio=None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors="pt",
        images=None,
    ) -> BatchFeature:
        """The arguments of the model's `forward`, padded: ids and masks int64, features float32.

        return_tensors: "pt", the only kind there is. images: `image` as other processors call it.

        Raises: ValueError: an input cannot be used, or the model was trained without its kind.
        """
        if image is not None and images is not None:
            raise ValueError("image and images are the same; give one of them")
        image = images if image is None else image
        if return_tensors not in (None, "pt"):
            raise ValueError(f'return_tensors is {return_tensors!r}; there are tensors of PyTorch only, "pt"')
        for name, given in (("text", text), ("image", image), ("audio", audio)):
            if isinstance(given, list | tuple) and not given:
                raise ValueError(f"the list given as {name} is empty; leave it out where there is none")
        inputs = {}
        if text is not None:
            ids = [self.ids(one) for one in listed(text)]
            inputs["input_ids"] = padded([torch.tensor(row) for row in ids], self.tokenizer.pad_token_id)
            inputs["attention_mask"] = padded([torch.ones(len(row), dtype=torch.long) for row in ids])
        if image is not None:
            features, boxes = zip(*(self.regions(one) for one in listed(image)), strict=True)
            inputs["region_features"], inputs["region_boxes"] = padded(features), padded(boxes)
            inputs["region_attention_mask"] = padded([torch.ones(len(x), dtype=torch.long) for x in boxes])
        if audio is not None:
            frames = [self.audio(one, sampling_rate) for one in listed(audio)]
            inputs["audio_features"] = padded(frames)
            inputs["audio_attention_mask"] = padded([torch.ones(len(x), dtype=torch.long) for x in frames])
        if not inputs:
            raise ValueError("give a text, an image or an audio")
        if len({len(x) for x in inputs.values()}) > 1:
            raise ValueError("texts, images and audios are to be as many")
        return BatchFeature(inputs)

    def labels(self, text) -> Tensor:
        """The model's `labels` int64 [B, N] for a text, or for several."""
        return padded([torch.tensor(self.ids(one)[1:]) for one in listed(text)], IGNORED)

    def codes(self, image) -> Tensor:
        """The model's `image_codes` int64 [B, G] for a picture, or for several."""
        dvae = self.needed_dvae()
        squares = np.stack([fit_square(as_array(one), dvae.image_size) for one in listed(image)])
        return torch.from_numpy(dvae.encode(squares))

    def needed_dvae(self) -> DiscreteVAE:
        """Raises: ValueError: the folder has none."""
        if self.dvae is None:
            raise ValueError(
                "there is no dvae/ in the folder, and no picture has codes: the model was trained without"
                " pixels, or exported without its decoders (--only=encoder)"
            )
        return self.dvae

    def ids(self, text: str) -> list[int]:
        """Of [CLS], the word pieces and [SEP]; of a longer text the first, and [SEP]."""
        if not isinstance(text, str):
            raise ValueError(f"a text is {type(text).__name__}, expected str")
        if not text.strip():
            raise ValueError("the text is empty; leave it out where there is none")
        return self.tokenizer(text, truncation=True, max_length=self.settings["max_text_tokens"])["input_ids"]

    def regions(self, image) -> tuple[Tensor, Tensor]:
        """Features [V, F] and boxes [V, 7] of a picture."""
        kind, image = self.settings["regions"], as_array(image)
        if kind == "detector":
            found = self.detector(image)
            features = found["features"]
            boxes = relative_boxes(found["boxes"].float().cpu().numpy(), *found["size"].tolist())
        elif kind == "grid":
            features, boxes = self.dvae.grid_regions(image, self.settings["grid_window"])
        else:
            reasons = {
                "ready": "takes pictures as regions of a detector elsewhere: give the model its"
                " region_features and region_boxes",
                "none": "was trained without pictures",
            }
            raise ValueError(f"this model {reasons[kind]}")
        if not len(features):
            raise ValueError("nothing was found in the picture")
        most = self.settings["max_regions"]
        return self.as_cached(features[:most]), torch.from_numpy(boxes[:most])

    def audio(self, recording, sampling_rate: int = SAMPLE_RATE) -> Tensor:
        """Features [A, F] of a recording, `audio_stack` frames to a position.

        The last position is filled up with the last frame. What is too long is cut.
        """
        if self.speech is None:
            raise ValueError("this model was trained without recordings")
        frames = self.speech(as_waveform(recording, sampling_rate, self.settings["max_seconds"]))
        stack = self.settings["audio_stack"]
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % stack, -1)])
        stacked = frames.reshape(-1, stack * frames.shape[1])
        return self.as_cached(stacked[: self.settings["max_audio_positions"]])

    def as_cached(self, features: Tensor) -> Tensor:
        """Rounded as those that the model was trained on."""
        rounded = features.float().cpu().to(getattr(torch, self.settings["feature_dtype"])).float()
        if not rounded.isfinite().all():
            raise ValueError(f"the features of the input are not finite as {self.settings['feature_dtype']}")
        return rounded

    # --- from the model ------------------------------------------------------------------------------------

    def caption(self, model, image, **options):
        """A sentence about a picture; options of `write`."""
        return self.write(model, image=image, **options)

    def transcribe(self, model, audio, image=None, sampling_rate: int = SAMPLE_RATE, **options):
        """What is said in a recording, with a picture's help where there is one; options of `write`."""
        return self.write(model, image=image, audio=audio, sampling_rate=sampling_rate, **options)

    @torch.no_grad()
    def write(self, model, num_beams: int | None = None, max_length: int | None = None, **inputs):
        """The text that the model writes for the inputs of `__call__`: one, or a list for lists.

        num_beams: by default that of the model's evaluation. max_length: word pieces at most, with [SEP].
        """
        most = counted("max_length", max_length, self.settings["max_new_tokens"])
        most = min(most, model.config.max_text_positions)
        beams = counted("num_beams", num_beams, self.settings["num_beams"])
        output = self.encoded(model, **inputs)
        ids, _ = model.generate_text(output, max_length=most, num_beams=beams)
        texts = self.batch_decode(ids)
        many = any(isinstance(one, list | tuple) for one in inputs.values())
        return texts if many else texts[0]

    def decode(self, ids) -> str:
        """The text of ids [N], without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def batch_decode(self, ids) -> list[str]:
        """The texts of ids [B, N], without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def draw(
        self, model, text=None, audio=None, sampling_rate: int = SAMPLE_RATE, seed: int = 0, number=None
    ):
        """A PIL image of a text, a recording, or of both: of several drawn ones that which matches best.

        seed: of the drawing, from 0 on. number: of pictures drawn, by default that of the settings; one with
        a fine-tuned model.
        """
        dvae, pil = self.needed_dvae(), pillow()
        given = {"text": text, "audio": audio}
        given = {name: one for name, one in given.items() if one is not None}
        if not given or any(isinstance(one, list | tuple) for one in given.values()):
            raise ValueError("one picture is drawn: give one text, one audio or both, and no list")
        number = counted("number", number, self.settings["num_drawn"])
        if number > 1 and self.settings["task"]:
            raise ValueError(
                f"number is {number}, of which the matching head would choose; fine-tuning for"
                f" {self.settings['task']} moved it, so draw one, or several by their seeds"
            )
        encoded = self.encoded(model, **given, sampling_rate=sampling_rate)
        names = ("last_hidden_state", "attention_mask")
        rows = {name: encoded[name].expand(number, *encoded[name].shape[1:]) for name in names}
        encoded = dataclasses.replace(encoded, **rows)
        options = {"top_k": self.settings["top_k"], "noise": lambda step, shape: gumbel(seed, step, shape)}
        options["guidance"] = self.settings["guidance"]
        codes, _ = model.generate_image_codes(encoded, **options)
        pictures = dvae.decode(codes.cpu())
        query, best = "text" if text is not None else "audio", 0
        if number > 1:
            asked = self(**{query: given[query]}, sampling_rate=sampling_rate)
            shown = self(image=list(pictures))
            shown |= {name: x.expand(number, *x.shape[1:]) for name, x in asked.items()}
            logits = model(**shown.to(model.device)).matching_logits
            best = int((logits[:, PAIR_CLASS[query]] - logits[:, NONE_MATCH]).argmax())
        return pil.Image.fromarray(np.asarray(pictures[best]))

    def encoded(self, model, **inputs):
        """The model's output for the inputs of `__call__`."""
        return model(**self(**inputs).to(model.device))


def listed(values) -> list:
    """Several, or one, as a list."""
    return list(values) if isinstance(values, list | tuple) else [values]


def padded(rows, value: int = 0) -> Tensor:
    """[B, longest, ...] of rows [n, ...]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
