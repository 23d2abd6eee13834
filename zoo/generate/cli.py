"""`zoo generate MODEL --prompt TEXT --image FILE ...`: ask a model, about pictures or not."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zoo.models.core.errors import UsageError

if TYPE_CHECKING:
    from zoo.loaded import Loaded

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run the command line and print the answer.

    Raises:
      UsageError, ZooError: as `zoo.load` and `Loaded.generate`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {args.max_new_tokens}: want 1 or more")
    if args.stream and args.json:
        raise UsageError("--stream and --json: want one of them; an object is printed at once")
    if args.agent is not None and (args.stream or args.raw or args.system is not None):
        raise UsageError(
            "--agent asks the model several questions: leave --stream, --raw and --system out"
        )

    from zoo.cache import keep_compiled_programs  # after the flags: JAX takes a second to import
    from zoo.generate.sampling import Sampling
    from zoo.loading import load

    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed
    )
    keep_compiled_programs()
    loaded = load(args.model) if args.dtype is None else load(args.model, dtype=args.dtype)
    options = {
        "system": args.system,
        "raw": args.raw,
        "budget": args.budget,
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "stop": args.stop,
    }
    images = args.image[0] if len(args.image) == 1 else args.image or None
    if args.stream:
        _stream(loaded, images, args.prompt, options)
        return 0
    if args.agent is None:
        answer = loaded.generate(images, args.prompt, **options)
    else:
        answer = _with_agent(loaded, args.agent, args.image, args.prompt, options)
    if args.json:
        facts = {"model": args.model, "images": args.image, "system": args.system}
        facts |= {"prompt": args.prompt, "answer": answer, "budget": args.budget}
        print(json.dumps(facts, indent=2))
    else:
        print(answer)
    return 0


def _with_agent(
    loaded: "Loaded", name: str, images: Sequence[str], prompt: str, options: dict[str, Any]
) -> str:
    """What a model answers with an agent around it."""
    from zoo.evaluate.model import ModelSubject
    from zoo.evaluate.subject import Agent, Query
    from zoo.models.core.registry import create

    agent = create(name)
    if not isinstance(agent, Agent):
        raise UsageError(f"--agent {name}: no agent; see `zoo list --kind agent-inference`")
    del options["system"], options["raw"]
    subject = agent.wrap(ModelSubject(loaded, budget=options.pop("budget")))
    [answer] = subject.generate([Query(prompt, tuple(images))], **options)
    return answer


def _stream(loaded: "Loaded", images: Any, prompt: str, options: dict[str, Any]) -> None:
    """Print the answer while it is being written."""
    for piece in loaded.stream(images, prompt, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo generate", description="Ask a model a question, about pictures or without any."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a training run or of a checkpoint, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="any picture file; once for each picture, in their order",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is what the model reads, a placeholder for each picture included: no chat "
        "template is applied",
    )
    parser.add_argument(
        "--budget", type=int, metavar="M", help="vision tokens for a picture; by default all"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of the longest answer"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="cut the answer off where this begins; may be given several times",
    )
    parser.add_argument(
        "--agent", metavar="NAME", help="what stands around the model: damro, dc2, zoomeye, ..."
    )
    sampling = parser.add_argument_group("choice of tokens", "by default the most likely ones")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens, flatter above 1"
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="from so many of the most likely"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from the most likely of this share"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, what has been said becomes less likely",
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    parser.add_argument("--dtype", choices=DTYPES, help="what the model computes in")
    parser.add_argument("--stream", action="store_true", help="print while the answer is written")
    parser.add_argument("--json", action="store_true", help="print one object")
    return parser
