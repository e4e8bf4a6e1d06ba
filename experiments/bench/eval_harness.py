"""What the harness costs beside a model and a judge that answer after 50 ms.

    python experiments/bench/eval_harness.py --rows 1100 --concurrency 32

Rows in ChineseSimpleVQA's layout are made up, each with a picture of 256 pixels. A
server in a process of its own plays model and judge. Three clients ask it, each in a
process of its own, from starting Python to the last file written:

* ``jaxalign eval`` with pictures, answers, judgements, store, figures and page;
* the same with the questions alone and no judge (the rules grade);
* lm-evaluation-harness's ``local-chat-completions`` client on the same questions, which
  judges nothing and writes nothing: the nearest harness that installs without CUDA
  (lmms-eval and VLMEvalKit want torchvision and its CUDA build, and do not).

Calls a second are those that could be made (concurrency / latency) at best. A minute on
two cores. Seen on an AMD EPYC: 0.51 of the bound with pictures and judge (13.6 s, some
four of them to start Python and two for figures and page; 394 MB), 0.44 of half as many
calls (7.8 s, 376 MB); lm-eval's client 0.78 (4.4 s, 88 MB, no JAX).
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


LATENCY = 0.05


class Server(asyncio.Protocol):
    """Answers a chat completion after a while, a judge's in its schema."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.got = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self.got += data
        end = self.got.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = bytes(self.got[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(self.got) < end + length:
            return
        judged = b'"response_format"' in self.got
        self.got = bytearray()
        text = '{"grade": "correct"}' if judged else "It is the seventh bridge."
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": text}}
        usage = {"prompt_tokens": 90, "completion_tokens": 9}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        kind = "Content-Type: application/json\r\n"
        head_out = f"HTTP/1.1 200 OK\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        loop.call_later(LATENCY, self.transport.write, head_out.encode() + body)


async def serve() -> None:
    """Serve until killed; the first line on stdout is the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def write(folder: Path, rows: int) -> None:
    """Write rows and pictures as they are published."""
    from PIL import Image

    place = folder / "chinese_simplevqa"
    (place / "images").mkdir(parents=True)
    chance = random.Random(0)
    lines = []
    for n in range(rows):
        noise = Image.frombytes("RGB", (32, 32), chance.randbytes(32 * 32 * 3))
        noise.resize((256, 256)).save(place / "images" / f"{n}.jpg")
        row = {
            "ID": f"{n}",
            "image_url": f"https://example.org/{n}",
            "recognition_question": f"What is shown in picture {n}?",
            "recognition_answer": f"bridge {n}",
            "final_question": f"When was what picture {n} shows built?",
            "final_answer": f"{1000 + n}",
            "Topic": f"topic {n % 8}|part {n % 40}",
            "matched_image": f"{n}.jpg",
            "desc": f"Bridge {n}.",
        }
        lines.append(json.dumps(row))
    (place / "chinese_simplevqa.jsonl").write_text("\n".join(lines))


def peer(port: str, rows: int, concurrency: int) -> None:
    """Ask the same questions with lm-eval's client."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.api_models import JsonChatStr

    asked = [f"What is shown in picture {n}?" for n in range(rows)]
    asked += [f"When was what picture {n} shows built?" for n in range(rows)]
    model = get_model("local-chat-completions").create_from_arg_string(
        f"model=m,base_url=http://127.0.0.1:{port}/v1/chat/completions,"
        f"num_concurrent={concurrency},max_retries=3,tokenized_requests=False"
    )
    options = {"until": [], "max_gen_toks": 256, "temperature": 0.0}
    made = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(
                JsonChatStr(json.dumps([{"role": "user", "content": text}])),
                options,
            ),
            idx=n,
        )
        for n, text in enumerate(asked)
    ]
    assert len(model.generate_until(made)) == len(asked)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1100)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role and options.role[0] == "server":
        asyncio.run(serve())
        return
    if options.role:
        peer(options.role[1], options.rows, options.concurrency)
        return
    own = [sys.executable, __file__, "--rows", str(options.rows)]
    own += ["--concurrency", str(options.concurrency), "--role"]
    server = subprocess.Popen([*own, "server"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    quiet = subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write(folder, options.rows)
        url, wide = f"http://127.0.0.1:{port}/v1", str(options.concurrency)
        evaluate = [
            *(sys.executable, "-m", "jaxalign.cli.main", "eval"),
            *("--tasks", "chinese_simplevqa", "--data_dir", str(folder)),
            *("--endpoint.base_url", url, "--endpoint.model", "m"),
            *("--endpoint.concurrency", wide),
        ]
        judge = ["--judge.base_url", url, "--judge.model", "j"]
        judge += ["--judge.concurrency", wide]
        whole = [*evaluate, *judge, "--out", str(folder / "a")]
        text = [*evaluate, "--conditions", "text_only", "--out", str(folder / "b")]
        calls = 2 * options.rows
        bound = options.concurrency / LATENCY
        print(f"{options.rows} rows, {options.concurrency} calls at a time\n")
        print("| client | calls | seconds | items/s | of the bound | peak MB |")
        print("|---|---|---|---|---|---|")
        # Equal judgements, as here, are asked once: each row's are its own.
        for name, command, count in (
            ("jaxalign, pictures and judge", whole, 2 * calls),
            ("jaxalign, text, rules", text, calls),
            ("lm-eval, text, no grades", [*own, "peer", port], calls),
        ):
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
            _, status, usage = os.wait4(process.pid, 0)
            took = time.perf_counter() - began
            assert status == 0
            peak = usage.ru_maxrss / 1e3
            print(
                f"| {name} | {count} | {took:.1f} | {options.rows / took:.0f} | "
                f"{count / took / bound:.2f} | {peak:.0f} |",
                flush=True,
            )
    server.terminate()
    server.communicate()


if __name__ == "__main__":
    main()
