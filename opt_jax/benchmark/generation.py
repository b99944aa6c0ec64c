"""Times the writing of texts beside transformers' `generate`: `python -m opt_jax.benchmark.generation`.

The text decoder at the sizes of a configuration, and an MBart decoder of the same sizes with the same random
weights, write the most likely texts for the same M, each with its key-value cache: greedily, or by beam
search with `--beams`. No text ends before its last position. The sides take turns; their texts are compared.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping

# JAX would otherwise take most of a GPU's memory, and PyTorch runs on the same one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402  (after the environment that JAX reads)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from opt_jax.allocator import keep_freed_memory  # noqa: E402
from opt_jax.benchmark.__main__ import CONFIG  # noqa: E402
from opt_jax.benchmark.measure import interleaved, middle  # noqa: E402
from opt_jax.configuration import load  # noqa: E402
from opt_jax.models.generation import generate_text  # noqa: E402
from opt_jax.models.opt import OPT, Sizes  # noqa: E402
from opt_jax.partitioning import path_name, unbox  # noqa: E402

OURS, THEIRS = "this project", "transformers"
START = 0  # the word whose vector begins a text on both sides; MBart knows no other beginning
NO_WORD = -1  # ends no text, and would stand where nothing was written

# Names in the parameter tree and in MBart's decoder layers.
LINEAR = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_out": ("self_attn.out_proj",),
    "query": ("encoder_attn.q_proj",),
    "memory": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross_out": ("encoder_attn.out_proj",),
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
}
NORMS = {
    "self_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
}


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("opt_jax.benchmark.generation", description=__doc__)
    add = parser.add_argument
    add("--variant", default="base", help="of the configuration; one with norms first, as MBart has them")
    add("--config", default=str(CONFIG), help="a configuration file like configs/pretrain.py")
    add("--batch", type=int, default=16, help="texts written at a time")
    add("--tokens", type=int, default=30, help="of each text")
    add("--memory", type=int, default=97, help="positions of M: [CLS], 36 regions and 60 of audio")
    add("--vocab_size", type=int, default=30522)
    add("--beams", type=int, default=1, help="1 is greedy")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    add("--repetitions", type=int, default=5)
    add("--skip_torch", action="store_true")
    return parser.parse_args(arguments)


def random_params(model: OPT) -> dict:
    """Parameters of the text decoder, and of the embedder whose words it shares, as float32 NumPy arrays.

    The kernels are so large that a text is not one word again and again.
    """

    def logits(opt, memory):
        return opt.text_logits(jnp.zeros((1, 2), int), opt.text_memory(memory), jnp.ones((1, 2), bool))

    width = model.config["hidden_size"]
    memory = jnp.zeros((1, 2, width), model.dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), memory, method=logits))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path_name(path)
        deviation = 2 * width**-0.5 if name.endswith("kernel") else 0.02
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(deviation) + name.endswith("scale")

    params = jax.tree_util.tree_map_with_path(draw, unbox(shapes))
    params["text_decoder"]["start"] = params["embedder"]["words"][START, None]
    return params


def ours(model: OPT, params, memory, flags) -> tuple[Callable[[], np.ndarray], float]:
    """A call that returns ids [B, tokens], and the seconds that its compilation took."""
    options = dict(max_length=flags.tokens, end_id=NO_WORD, pad_id=NO_WORD, beams=flags.beams)
    arguments = jax.device_put((params, memory.astype(model.dtype), np.ones(memory.shape[:2], bool)))
    start = time.perf_counter()
    write = jax.jit(lambda *args: generate_text(model, *args, **options)[0]).lower(*arguments).compile()
    return lambda: np.asarray(write(*arguments)), time.perf_counter() - start


def torch_arrays(params: Mapping) -> dict[str, np.ndarray]:
    """The parameters under the names and in the shapes of transformers' MBartForConditionalGeneration."""
    decoder, words = params["text_decoder"], params["embedder"]["words"]
    layers = dict(decoder["layers"])
    norms = {"layernorm_embedding": decoder["embedding_norm"], "layer_norm": layers.pop("final_norm")}
    linear = {}
    for i in range(len(layers["mlp_in"]["bias"])):
        norms |= {f"layers.{i}.{NORMS[name]}": {k: x[i] for k, x in layers[name].items()} for name in NORMS}
        for name, parts in LINEAR.items():
            bias = layers[name]["bias"][i].reshape(-1)
            matrix = layers[name]["kernel"][i].reshape(-1, bias.size).T
            split = zip(parts, np.split(matrix, len(parts)), np.split(bias, len(parts)), strict=True)
            linear |= {f"layers.{i}.{part}": {"weight": w, "bias": b} for part, w, b in split}
    both = linear | {name: {"weight": norm["scale"], "bias": norm["bias"]} for name, norm in norms.items()}
    found = {f"model.decoder.{name}.{leaf}": x for name, pair in both.items() for leaf, x in pair.items()}
    # MBart never reads the first two rows of its positions.
    found["model.decoder.embed_positions.weight"] = np.pad(decoder["positions"], ((2, 0), (0, 0)))
    found["final_logits_bias"] = decoder["output_bias"][None]
    return found | dict.fromkeys(("model.shared.weight", "model.decoder.embed_tokens.weight"), words)


def theirs(model: OPT, params, memory, flags) -> tuple[Callable[[], np.ndarray], int]:
    """A call that returns ids [B, tokens], and the number of the decoder's parameters."""
    import torch
    import transformers

    sizes, words = model.config["text_decoder"], params["embedder"]["words"]
    decoder = dict(layers=sizes["num_layers"], attention_heads=sizes["num_heads"], ffn_dim=sizes["mlp_size"])
    config = transformers.MBartConfig(
        vocab_size=len(words),
        d_model=words.shape[1],
        max_position_embeddings=len(params["text_decoder"]["positions"]),
        encoder_layers=0,  # M is given
        **{f"decoder_{name}": value for name, value in decoder.items()},
        **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), START),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "forced_eos_token_id")),
    )
    network = transformers.MBartForConditionalGeneration(config).eval()
    arrays = {name: torch.from_numpy(np.array(x)) for name, x in torch_arrays(params).items()}
    network.load_state_dict(arrays, strict=False)  # without the encoder's
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = model.config["layer_norm_epsilon"]
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    network.to(device, getattr(torch, flags.dtype))
    states = torch.from_numpy(memory).to(device, getattr(torch, flags.dtype))
    valid = torch.ones(memory.shape[:2], dtype=torch.int64, device=device)
    options = dict(max_new_tokens=flags.tokens, num_beams=flags.beams, do_sample=False, use_cache=True)

    @torch.inference_mode()
    def write():
        # An object of its own for each call: with beams `generate` repeats what is in it.
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        ids = network.generate(encoder_outputs=encoded, attention_mask=valid, **options)
        return ids[:, 1:].cpu().numpy()  # without the beginning

    used = (*network.get_decoder().parameters(), network.final_logits_bias)
    return write, sum(numbers.numel() for numbers in used)


def main(flags: argparse.Namespace) -> dict[str, float]:
    """Measures, prints, and returns median seconds by name."""
    keep_freed_memory()
    config = load(flags.config, flags.variant)
    config.precision = flags.dtype
    if not config.model.pre_norm:
        raise SystemExit(f"--variant={flags.variant} has norms last; MBart has them first, as 'base' has")
    model = OPT(config.model.to_dict(), Sizes(flags.vocab_size, 1, 1, 1, 1, 1))
    params = random_params(model)
    width, decoder = config.model.hidden_size, config.model.text_decoder
    memory = np.random.default_rng(1).standard_normal((flags.batch, flags.memory, width), np.float32)
    write, compiling = ours(model, params, memory, flags)
    calls = {OURS: write}
    used = params["text_decoder"], params["embedder"]["words"]
    count = {OURS: sum(leaf.size for leaf in jax.tree.leaves(used))}
    versions = f"jax {jax.__version__}"
    if not flags.skip_torch:
        import torch
        import transformers

        calls[THEIRS], count[THEIRS] = theirs(model, params, memory, flags)
        versions += f", torch {torch.__version__} with {torch.get_num_threads()} threads"
        versions += f", transformers {transformers.__version__}"

    kind = jax.devices()[0].device_kind
    print(f"{kind} with {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}")
    print(
        f"{flags.batch} texts of {flags.tokens} tokens from {flags.memory} positions, {flags.dtype},"
        f" {'greedy' if flags.beams == 1 else f'{flags.beams} beams'}"
    )
    print(
        f"decoder of {decoder.num_layers} layers, {width} wide, {decoder.num_heads} heads, MLP"
        f" {decoder.mlp_size}, vocabulary {flags.vocab_size}"
    )
    print(f"compiled in {compiling:.1f} s, which no figure has; medians of {flags.repetitions} runs in turn")
    seconds = interleaved(calls, flags.repetitions)
    medians, tokens = middle(seconds), flags.batch * flags.tokens
    for name, values in seconds.items():
        print(
            f"  {name:14}{tokens / medians[name]:8.0f} tokens/s"
            f" ({tokens / max(values):.0f} to {tokens / min(values):.0f}), {medians[name]:.3f} s,"
            f" {count[name] / 1e6:.1f} M parameters"
        )
    if THEIRS in calls:
        alike = (calls[OURS]() == calls[THEIRS]()).sum()
        ratio = medians[THEIRS] / medians[OURS]
        print(f"  {OURS} / {THEIRS}: {ratio:.2f}; {alike} of {tokens} tokens are the same")
    return medians


if __name__ == "__main__":
    main(parse())
