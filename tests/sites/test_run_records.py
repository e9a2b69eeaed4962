"""Public records are refused if they share texts with a run's own, or were written by a run; test records by site."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.data import Record
from fedtune.sites.run_records import RunRecords, assign_sites, find_card_path, record_generated_texts, require_disjoint
from fedtune.spec import ConfigError

PRIVATE = [f"The {n}th Café visit of Straße {n}" for n in range(200)]
FOREIGN = [f"Nobody's text {n}" for n in range(400)]
COPIES: dict[str, Any] = {
    "as they are": str,
    "in capitals": str.upper,
    "with an invisible letter": lambda text: text.replace("e", "e\u200b"),
    "with other blanks": lambda text: text.replace(" ", " \u00a0\n"),
    "in another form": lambda text: text.replace("é", "e\u0301").replace("C", "\uff23"),
}


def make_records(texts: Sequence[str | Record], role: str = "text") -> list[Record]:
    return [one if isinstance(one, Record) else Record({role: one, "label": "a"}) for one in texts]


class Own(RunRecords):
    """The files of a run, by name."""

    def __init__(self, folder: Path, **files: Sequence[str | Record]) -> None:
        self.folder, self.texts = folder, files

    @property
    def runs_folder(self) -> Path:
        return self.folder

    def read_records_by_setting(self) -> dict[str, list[Record]]:
        return {name: make_records(texts[:100]) for name, texts in self.texts.items()}

    def read_whole_files(self) -> Iterator[tuple[str, list[Record]]]:
        yield from ((name, make_records(texts)) for name, texts in self.texts.items())


def check(public: Sequence[str], own: Own, *, role: str = "text", allow_synthetic: bool = False) -> None:
    file = own.folder / "public.jsonl"
    file.touch()
    require_disjoint(
        make_records(public, role), own, key="public.train_file", file=str(file), allow_synthetic=allow_synthetic
    )


@pytest.mark.parametrize("role", ["text", "prompt"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_public_file_copied_from_private_texts_is_refused(copied: Any, role: str, tmp_path: Path) -> None:
    """Before, a file that was neither a part of the run's nor the whole of it passed for public."""
    own = Own(tmp_path, sites=PRIVATE)
    with pytest.raises(ConfigError, match=r"must not contain records of the run: it shares 9\d+ texts with sites"):
        check([*map(copied, PRIVATE[1:]), FOREIGN[0]], own, role=role)
    check(FOREIGN, own, role=role)


@pytest.mark.parametrize("codes", [4, 200])
def test_public_file_with_private_completions_is_refused(codes: int, tmp_path: Path) -> None:
    """Before, one role of the run's records was compared: of two that differ everywhere, the first."""
    prompts = [f"Code {n % codes}" for n in range(200)]
    pairs = zip(prompts, PRIVATE, strict=True)
    own = Own(tmp_path, sites=[Record({"prompt": prompt, "completion": said}) for prompt, said in pairs])
    with pytest.raises(ConfigError, match="it shares 40 texts with sites"):
        check([*PRIVATE[:40], *FOREIGN[:160]], own, role="completion")
    if codes == 4:
        check(prompts, own, role="prompt")


@pytest.mark.parametrize(
    ("private", "foreign", "refused"),
    [
        (slice(0, 5), 400, False),  # as any two files of one field may have: 5 of the 100 that the run uses
        (slice(0, 6), 400, True),
        (slice(100, 110), 400, False),  # 10 of the file's 200, which the run does not use
        (slice(100, 111), 400, True),
        (slice(100, 105), 95, False),  # 5 of 100 public ones
        (slice(100, 106), 94, True),
        (slice(0, 1), 0, True),
    ],
)
def test_public_file_may_share_five_percent_of_its_texts(
    private: slice, foreign: int, refused: bool, tmp_path: Path
) -> None:
    public, own = [*PRIVATE[private], *FOREIGN[:foreign]], Own(tmp_path, sites=PRIVATE)
    if refused:
        with pytest.raises(ConfigError, match="must not contain records of the run"):
            check(public, own)
    else:
        check(public, own)


def test_shared_texts_add_up_over_many_sites(tmp_path: Path) -> None:
    sites = {f"site{n}": [f"Site {n}, text {m}" for m in range(100)] for n in range(30)}
    few = [texts[-1] for texts in sites.values()]
    with pytest.raises(ConfigError, match="it shares 1 text with site0"):
        check([*few, *FOREIGN[:70]], Own(tmp_path, **sites))
    check([*few[:2], *FOREIGN[:70]], Own(tmp_path, **sites))


def test_synthetic_texts_without_a_card_are_recognized_by_their_run(tmp_path: Path) -> None:
    written, own = [f"A model wrote {n}" for n in range(40)], Own(tmp_path, sites=PRIVATE)
    (tmp_path / "writer").mkdir()
    record_generated_texts(tmp_path / "writer", written[:20])
    record_generated_texts(tmp_path / "writer", written[20:])
    for allow_synthetic in (False, True):
        with pytest.raises(ConfigError, match=r"must contain public records: .*writer generated some of them"):
            check([*map(str.upper, written[15:25]), *FOREIGN[:90]], own, allow_synthetic=allow_synthetic)
    check([*written[:2], *FOREIGN[:90]], own)
    find_card_path(tmp_path / "public.jsonl", ".json").touch()
    check(written, own, allow_synthetic=True)  # whose epsilon is read from it
    with pytest.raises(ConfigError, match=r"public\.jsonl\.card\.json next to it lists the runs"):
        check(written, own)


def test_recording_generated_texts_requires_a_writable_folder(tmp_path: Path) -> None:
    (tmp_path / "writer").touch()  # no folder
    with pytest.raises(ConfigError, match="must be a writable folder"):
        record_generated_texts(tmp_path / "writer", ["a text"])


def test_records_belong_to_the_site_holding_their_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = (json.dumps({"text": f"{name} {n}", "label": "xy"[n % 2]}) for n in range(40))
        (tmp_path / f"of-{name}.jsonl").write_text("\n".join(rows))
    files = ("data.partition.kind=file", f"data.train_file='{tmp_path}/of-{{site}}.jsonl'", "data.labels=[x,y]")
    sites = ("federation.num_sites=2", "federation.site_names=[a,b]", "data.test_file=null", "data.test_fraction=0.3")
    config = compose_run(["experiment=own_data", "data.declared_sizes=20", *files, *sites])
    tested = RunRecords(config).dealt.test
    assert assign_sites(config, tested) == [record.fields["text"][0] for record in tested]
    assert {*(record.fields["text"][0] for record in tested)} == {"a", "b"}
    assert assign_sites(config, make_records(FOREIGN)) is None, "of another file"
