"""Readers of lists, a JSON value a line, and of what evaluations write; what is read of a mutant must be what its JSON says."""

from __future__ import annotations

import json

from tests.mutation.mutants import damaged_bytes, damaged_json


class Lines:
    """A JSON lines file. `rows`: what the good one holds."""

    file = "list.jsonl"
    rows: tuple[dict, ...] = ()

    def make(self, folder):
        from PIL import Image

        for name in ("a.png", "b.png"):
            Image.new("RGB", (16, 16)).save(folder / name)
        (folder / self.file).write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def mutate(self, rng, good, folder):
        lines = (good / self.file).read_bytes().splitlines()
        if rng.random() < 0.3:
            hurt = damaged_bytes(rng, b"\n".join(lines))
        else:
            n = rng.randrange(len(lines))
            hurt = b"\n".join([*lines[:n], damaged_json(rng, lines[n]), *lines[n + 1 :]])
        (folder / self.file).write_bytes(hurt)

    def values(self, folder):
        """What the lines say, as plain JSON."""
        return [json.loads(line) for line in (folder / self.file).read_bytes().splitlines() if line.strip()]


class JobsList(Lines):
    """A list of generations: its lines, with options checked as for a call."""

    rows = (
        dict(prompt="a cup", output="a.png", references=["a.png"], steps=3, image_scale=[0.5], granularity=[0, 1, 1]),
        dict(prompt=["a cup", "a mug"], output="{prompt}_{seed}.png", seed=7, num_images=2, regions="none"),
        dict(
            prompt="a cup and a mug", output="b.png", references=["a.png", "b.png"], words=["cup", "mug"], true_cfg=2.0
        ),
        dict(prompt="a cup", output="c.png", noise="n.npy", noise_row=1, masks="a.png"),
    )

    def read(self, folder):
        from dynaip_jax.jobs.rows import read_jobs
        from dynaip_jax.sampling.options import SampleOptions, texts

        jobs, failures = read_jobs(folder / self.file, {})
        for error in failures.values():
            raise error
        for job in jobs:
            SampleOptions(**job.options)
            texts("prompt", job.prompt)
        return [(job.prompt, job.output, job.words, dict(job.options), job.noise_row, job.files) for job in jobs]

    def different(self, folder, found):
        plain = [
            (row["prompt"], row["output"], {k: v for k, v in row.items() if k in read[3] and v is not None})
            for row, read in zip(self.values(folder), found, strict=True)
        ]
        return None if plain == [(job[0], job[1], job[3]) for job in found] else "not what its JSON says"


class OwnSet(Lines):
    """A set of one's own."""

    rows = (
        dict(prompt="a cup", references=["a.png"]),
        dict(
            prompt="a cup and a dog",
            references=[["a.png", "b.png"], "b.png"],
            words=["cup", "dog"],
            masks=["a.png", "b.png"],
            name="two",
        ),
    )

    def read(self, folder):
        from dynaip_jax.measuring.sets import read_set

        return [
            (case.prompt, case.name, [s.words for s in case.subjects]) for case in read_set(folder / self.file).cases
        ]

    def different(self, folder, found):
        plain = [row["prompt"] for row in self.values(folder)]
        return None if plain == [case[0] for case in found] else "not what its JSON says"


class Answers(Lines):
    """A judge's answers, of which lines that are none are left out."""

    rows = tuple(dict(key=f"{n:064x}", text=f'{{"score": {n}}}', input_tokens=9, output_tokens=n) for n in range(3))

    def read(self, folder):
        from dynaip_jax.measuring.client import Cache

        cache = Cache(folder / self.file)
        return {key: list(reply) for key, reply in cache.items()}

    def different(self, folder, found):
        plain = {}
        for line in (folder / self.file).read_bytes().splitlines():
            try:
                row = json.loads(line)
                plain[row["key"]] = [row["text"], row["input_tokens"], row["output_tokens"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return None if all(plain.get(key) == reply for key, reply in found.items()) else "not what its JSON says"


class ScoresFile(Lines):
    """The scores of a run."""

    file = "scores.json"

    def make(self, folder):
        from dynaip_jax.measuring.scores import Row, Scores

        rows = [Row("a", n, f"pictures/{n}.png", {"CLIP-I": 0.5, "CP": None}, {"CP": "because"}) for n in range(2)]
        (folder / self.file).write_bytes(Scores("f" * 64, "own", dict(steps=2, model=None), rows).as_json())

    def mutate(self, rng, good, folder):
        (folder / self.file).write_bytes(damaged_json(rng, (good / self.file).read_bytes()))

    def read(self, folder):
        from dynaip_jax.measuring.scores import read_scores

        return read_scores(folder).as_json()

    def different(self, folder, found):
        from dynaip_jax.measuring.scores import Row, Scores

        value = json.loads((folder / self.file).read_bytes())
        rows = [Row(*(row[name] for name in Row._fields)) for row in value["rows"]]
        plain = Scores(value["fingerprint"], value["name"], value["settings"], rows).as_json()
        return None if json.loads(plain) == json.loads(found) else "not what its JSON says"
