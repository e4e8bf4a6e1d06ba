"""Measure TRL's DPOTrainer: pairs and tokens per second, peak memory, losses.

    python experiments/bench/trl_side.py --model DIR --data PAIRS.jsonl --steps 12 \
        --warmup_steps 2 --batch_size 4 --max_length 512 --out trl.json

The yardstick of `jaxalign`'s own speed. Run it in a fresh process, with nothing else on
the machine. Records are {"prompt", "chosen", "rejected"}, chat messages or plain
strings; other columns are ignored. The first steps * batch_size of them are trained on
once, in file order. On the CPU, LoRA through PEFT without dropout, AdamW at a constant
rate, DPO with beta 0.1, the reference by switching the adapter off (or, with
`--precompute true`, computed by TRL before training, timed apart). `--bf16 true` is
TRL's own mixed precision over float32 weights, `--dtype bfloat16` loads the weights so;
both together are what TRL does on a GPU by default.

`--error_pairs N`: after training, and after the peak of memory has been noted, the
first N measured pairs go through the model with the adapter off (the policy before
training) as TRL computes them, and through a second copy in float32: `error` is the
mean |difference| of a token's log-probability.

`--image_dir DIR`: the records have pictures there (`images`, names of files), and the
model sees: its processor is that of `vlm_checkpoints.py`, LoRA goes on the decoder
alone, and `tower_share` is the part of the steps that the vision tower took.

SmolLM2-135M, HH pairs up to 512 tokens, batches of 4, two cores: about 4 minutes.

Time runs from the end of one step to the end of the next, hence includes the loading of
the batch but neither the model's loading nor the tokenising. `tokens` are real tokens
of both renderings of a pair, the prompt counted in both, as TRL computes them.
`peak_gb` (10^9 bytes) is the peak resident memory of this process, loading included.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice, pairwise
from operator import mul
from pathlib import Path
from typing import Any


# Set before any Hugging Face import, which is when these are read: no hub, no pings.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    # A machine with an accelerator measures the CPU all the same.
    CUDA_VISIBLE_DEVICES="",
)

import torch  # noqa: E402
import vlm_checkpoints  # noqa: E402
from datasets import Dataset, Image, List  # noqa: E402
from peft import LoraConfig  # noqa: E402
from side_by_side import peak_gb  # noqa: E402
from torch.utils.data import Sampler, SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer  # noqa: E402


TARGETS = "q_proj,v_proj"
PACKAGES = ("trl", "transformers", "peft", "torch", "accelerate", "datasets")


class MeasuredDPOTrainer(DPOTrainer):
    """TRL's trainer, in file order, noting what each step was given and returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The precomputation below runs inside the parent's constructor.
        self.precompute_seconds = 0.0
        self.losses: list[float] = []
        self.pairs: list[int] = []
        self.tokens: list[int] = []
        self.padded_tokens: list[int] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.precompute_seconds += time.perf_counter() - start
        return dataset

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any
    ) -> torch.Tensor:
        # Here and not in the collator, which runs a batch ahead of the training.
        mask = inputs["attention_mask"]
        self.pairs.append(mask.shape[0] // 2)
        self.tokens.append(int(mask.sum()))
        self.padded_tokens.append(mask.numel())
        loss = super().training_step(model, inputs, *args)
        # The logged loss is rounded; this one is not.
        self.losses.append(loss.item())
        return loss


class StepClock(TrainerCallback):
    """Wall and processor time when training starts and after every step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.own: list[float] = []
        self.machine: list[float] = []

    def _note(self) -> None:
        self.wall.append(time.perf_counter())
        self.own.append(time.process_time())
        self.machine.append(machine_busy_seconds())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._note()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._note()


class TowerClock:
    """Seconds in a model's vision tower, of the calls since a moment."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = self._began = 0.0
        names = ("vision_model", "visual", "vision_tower")
        tower = next(
            module
            for name, module in model.named_modules()
            if name.split(".")[-1] in names
        )
        tower.register_forward_pre_hook(self._enter)
        tower.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def machine_busy_seconds() -> float:
    """Return the core seconds spent on anything, or stolen by the host, since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def parse_arguments() -> argparse.Namespace:
    def boolean(text: str) -> bool:
        if text not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
        return text == "true"

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image_dir", type=Path, help="of the records' pictures")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--gradient_checkpointing", type=boolean, default=False)
    parser.add_argument("--precompute", type=boolean, default=False)
    parser.add_argument("--bf16", type=boolean, default=False)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--error_pairs", type=int, default=0, help="0: no error")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, default=32)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not 0 <= arguments.warmup_steps < arguments.steps:
        parser.error("--warmup_steps must leave at least one of --steps to measure")
    return arguments


def load_pairs(path: Path, count: int, image_dir: Path | None) -> Dataset:
    """Return the file's first `count` pairs; fewer would mean a second epoch."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, count)]
    if len(records) < count:
        sys.exit(f"{path} holds {len(records)} pairs, steps * batch_size is {count}")
    columns = ("prompt", "chosen", "rejected")
    rows = [{column: record[column] for column in columns} for record in records]
    if image_dir is None:
        return Dataset.from_list(rows)
    for row, record in zip(rows, records, strict=True):
        row["images"] = [str(image_dir / name) for name in record["images"]]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def load_model(arguments: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    sees = arguments.image_dir is not None
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(arguments.model, dtype=dtype)


def lora_targets(arguments: argparse.Namespace) -> Any:
    """Return PEFT's target modules: of a model that sees the decoder's alone."""
    names = arguments.targets.split(",")
    if arguments.image_dir is None:
        return names
    return rf".*\b(text_model|language_model)\..*\.({'|'.join(names)})"


def make_trainer(
    arguments: argparse.Namespace, clock: StepClock, output_dir: str
) -> MeasuredDPOTrainer:
    config = DPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=1,
        max_steps=arguments.steps,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        loss_type=["sigmoid"],
        beta=0.1,
        precompute_ref_log_probs=arguments.precompute,
        gradient_checkpointing=arguments.gradient_checkpointing,
        use_cpu=True,
        # TRL turns bf16 on unless told not to.
        bf16=arguments.bf16,
        fp16=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=arguments.seed,
    )
    return MeasuredDPOTrainer(
        model=load_model(arguments, getattr(torch, arguments.dtype)),
        args=config,
        train_dataset=load_pairs(
            arguments.data,
            arguments.steps * arguments.batch_size,
            arguments.image_dir,
        ),
        processing_class=(
            AutoTokenizer.from_pretrained(arguments.model)
            if arguments.image_dir is None
            else vlm_checkpoints.load_processor(arguments.model)
        ),
        peft_config=LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=lora_targets(arguments),
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )


@torch.no_grad()
def error(trainer: MeasuredDPOTrainer, arguments: argparse.Namespace) -> dict:
    """Compare the base model's token log-probabilities with those of float32.

    The same batches, as TRL computes them and as a plain softmax in float32.
    """
    exact = load_model(arguments, torch.float32)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    apart, told, tokens, pairs = 0.0, 0.0, 0, 0
    batches = islice(trainer.get_train_dataloader(), arguments.warmup_steps, None)
    for inputs in batches:
        # The mask is of the tokens, what predicts them stands one place before.
        ids, wanted = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        given = {k: v for k, v in inputs.items() if k != "completion_mask"}
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        with model.disable_adapter(), trainer.accelerator.autocast():
            out = model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        logits = exact(**given, use_cache=False).logits[:, :-1]
        truth = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        mine = out.log_probs[:, -wanted.shape[1] :].float()[wanted]
        apart += (mine - truth[wanted]).abs().sum().item()
        told += mine.sum().item()
        tokens += mine.numel()
        pairs += ids.shape[0] // 2
        if pairs >= arguments.error_pairs:
            break
    return {"error": apart / tokens, "logp": told / tokens}


def main() -> None:
    arguments = parse_arguments()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(arguments, clock, output_dir)
        tower = None if arguments.image_dir is None else TowerClock(trainer.model)
        gb_before_training = peak_gb()
        trainer.train()
    peak = peak_gb()
    in_tower = None if tower is None else tower.seconds
    apart = error(trainer, arguments) if arguments.error_pairs else {}

    seconds = [end - start for start, end in pairwise(clock.wall)]
    first = arguments.warmup_steps
    measured = sum(seconds[first:])
    others = [
        (machine_end - machine - own_end + own) / (second * cores)
        for (machine, machine_end), (own, own_end), second in zip(
            pairwise(clock.machine), pairwise(clock.own), seconds, strict=True
        )
    ]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = arguments.steps * arguments.batch_size
    settings = {name: str(value) for name, value in vars(arguments).items()}
    report = {
        "rate": sum(trainer.pairs[first:]) / measured,
        "tokens_per_second": sum(trainer.tokens[first:]) / measured,
        "peak_gb": peak,
        **apart,
        # Of all steps, as the clock of the tower runs from the first.
        **({} if in_tower is None else {"tower_share": in_tower / sum(seconds)}),
        "gb_before_training": gb_before_training,
        "precompute_seconds": trainer.precompute_seconds,
        # The share of all cores that went to anything but this process meanwhile. A
        # figure taken while it is above a few percent is void.
        "others_share": sum(map(mul, others[first:], seconds[first:])) / measured,
        "others_share_per_step": others,
        "seconds_per_step": seconds,
        "losses": trainer.losses,
        "pairs_per_step": trainer.pairs,
        "tokens_per_step": trainer.tokens,
        "padded_tokens_per_step": trainer.padded_tokens,
        "pairs_dropped_by_trl": expected - len(trainer.train_dataset),
        "trainable_parameters": sum(p.numel() for p in parameters),
        "versions": {
            "python": sys.version.split()[0],
            **{package: version(package) for package in PACKAGES},
        },
        "settings": {
            **settings,
            "threads": torch.get_num_threads(),
            "trained_dtype": str(parameters[0].dtype),
            "attention": trainer.model.config._attn_implementation,
            "optimizer": str(trainer.args.optim),
            "max_grad_norm": trainer.args.max_grad_norm,
            "beta": trainer.beta,
        },
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{report['rate']:.3f} pairs/s, "
        f"{report['tokens_per_second']:.0f} tokens/s, {report['peak_gb']:.2f} GB, "
        f"first loss {trainer.losses[0]:.4f}, others {report['others_share']:.1%}"
    )


if __name__ == "__main__":
    main()
