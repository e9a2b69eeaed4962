"""Faults of the base model: what is loaded, what its hash covers, and what it lets one record do to another."""

from .mutant import Mutant

MANIFEST, REFUSALS, FITS = ("fedtune/model/manifest.py", "fedtune/model/refusals.py", "fedtune/model/fits.py")
OF_MANIFEST = ("tests/model/test_manifest.py",)
HOSTILE_FOLDERS = ("tests/model/test_hostile_folders.py",)

MODEL_FAULTS = (
    Mutant(
        name="loaded-from-the-original-folder",
        fault="A model's files are hashed in a folder of their own, and loaded from where they lay, beside others.",
        file=MANIFEST,
        old="yield Staged(folder=place,",
        new="yield Staged(folder=folder,",
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="config-not-pinned",
        fault="The model's hash leaves config.json out: the same weights with another activation pass for it.",
        file=MANIFEST,
        old="            hashes[name] = hashlib.sha256(content).hexdigest()",
        new='            hashes |= {} if name == "config.json" else {name: hashlib.sha256(content).hexdigest()}',
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="weights-alone-are-a-model",
        fault="A hash of the weights is taken for the model's, as by 0.1.0: tokenizer and config may be anybody's.",
        file=MANIFEST,
        old="        if sha256 == self.sha256:",
        new="        if sha256 in (self.sha256, self.weights_sha256):",
        tests=OF_MANIFEST,
    ),
    Mutant(
        name="redirecting-keys-followed",
        fault="config.json may name other weights, code or another config, which transformers then loads.",
        file=REFUSALS,
        old="        if key in _REDIRECTING and value is not None:",
        new="        if key in _REDIRECTING and value is None:",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="rope-by-the-batch",
        fault="Rope types that follow a batch's longest example are loaded: one record changes the others.",
        file=REFUSALS,
        old="_rope_refusal(fields) or _architecture_refusal(fields)",
        new="_architecture_refusal(fields)",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-architecture",
        fault="Every model that the library can build is taken, also those that size something by a batch's richest "
        "example: weights can hide from the try before a run that one record then turns all others.",
        file=REFUSALS,
        old="_rope_refusal(fields) or _architecture_refusal(fields) or _unknown_key_refusal(fields)",
        new="_rope_refusal(fields)",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-key-of-a-config",
        fault="config.json may have any key, and one of them makes transformers read an innocent other one as the name "
        "of the file with the weights.",
        file=REFUSALS,
        old=" or _unknown_key_refusal(fields)",
        new="",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="any-key-of-a-tokenizers-config",
        fault="tokenizer_config.json may have any key, and each is an argument of the library's tokenizer.",
        file=REFUSALS,
        old="        if may_name_own and key not in OF_TOKENIZER_CONFIG and not (",
        new="        if may_name_own and key in ('slow_tokenizer_file',) and not (",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="activations-of-a-whole-batch",
        fault="An activation works on a batch at once: the last elements of its tensor are rounded otherwise, so that "
        "a record's place decides its bits, which a model's weights can enlarge.",
        file="fedtune/model/base_model.py",
        old="    compute_by_row(model)\n",
        new="",
        tests=("tests/model/test_activations.py",),
    ),
    Mutant(
        name="tried-with-its-own-weights-alone",
        fault="Weights that show nothing on made-up examples pass the try before a run.",
        file="fedtune/training/preflight.py",
        old="with _random_weights(model, draws) if weights_chosen else nullcontext():",
        new="with nullcontext():",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="no-example-in-every-place",
        fault="The try leaves out the one that puts a whole example into every row, so that a kernel that rounds some "
        "places otherwise passes where made-up examples have padding.",
        file="fedtune/training/preflight.py",
        old="_rows(found, torch.zeros_like(rows))",
        new="_rows(found, rows)",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="made-up-from-a-fixed-seed",
        fault="What a model is tried with is the same each time, and a lead can look for a model that passes.",
        file="fedtune/training/preflight.py",
        old="Adapter.of(model), np.random.default_rng()",
        new="Adapter.of(model), np.random.default_rng(20241)",
        tests=("tests/training/test_preflight.py",),
    ),
    Mutant(
        name="map-names-a-repository",
        fault="special_tokens_map.json may tell the tokenizer's library which repository or folder to look into.",
        file="fedtune/model/refusals.py",
        old="        if key not in OF_SPECIAL_TOKENS_MAP:\n",
        new="        if key in ('vocab_file',):\n",
        tests=("tests/model/test_hostile_folders.py",),
    ),
    Mutant(
        name="text-grows-without-bound",
        fault="A tokenizer's normaliser may make gigabytes of one record's letters, and the site's process ends.",
        file="fedtune/data/tokenise.py",
        old="<= _MOST_LONGER * len(text) + _ROOM",
        new=">= 0",
        tests=("tests/tasks/test_tokenise.py",),
    ),
    Mutant(
        name="encoder-as-a-decoder",
        fault="An encoder trains as a language model, with a head whose GELU rounds by its place in the batch.",
        file="fedtune/model/fits.py",
        old="    if kind in ENCODERS:\n",
        new="    if kind in ():\n",
        tests=("tests/tasks/test_task_model.py",),
    ),
    Mutant(
        name="built-rope-not-looked-at",
        fault="Only the config's word for a rope type counts, and not what the library makes of it.",
        file=FITS,
        old="            reason = rotary_refusal(kind)",
        new="            reason = None",
        tests=HOSTILE_FOLDERS,
    ),
    Mutant(
        name="tokens-beyond-the-embedding",
        fault="A tokenizer may give ids without a row in the embedding: a site fails where a record has one.",
        file=FITS,
        old="    if largest >= rows:",
        new="    if largest >= 1 << 40:",
        tests=("tests/sites/test_pinned_model.py", *HOSTILE_FOLDERS),
    ),
    Mutant(
        name="positions-with-the-padding-row",
        fault="All 514 rows of a RoBERTa's table count as positions: an example of 513 tokens makes a site fail.",
        file=FITS,
        old="bounds.append(len(weight) - (padding + 1 if padding is not None else offset))",
        new="bounds.append(len(weight) - (0 if padding is not None else offset))",
        tests=HOSTILE_FOLDERS,
    ),
)
