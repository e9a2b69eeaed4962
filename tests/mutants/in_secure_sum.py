"""Faults of the secure sum: what lets a server read more than one sum, or believe a wrong one."""

from .mutant import Mutant

FOLDER = "fedtune/federation/secure"
AGREEMENT, MASKS, SHARES, MESSAGES, PARTY, SUMMATION = (
    f"{FOLDER}/{name}.py" for name in ("agreement", "masks", "shares", "messages", "party", "summation")
)
THRESHOLD = "fedtune/privacy/threshold.py"
OF_AGREEMENT, OF_MASKS, OF_SHARES, OF_SUM, HOSTILE, TRANSCRIPTS = (
    f"tests/federation/secure/test_{name}.py"
    for name in ("agreement", "masks", "shares", "secure_sum", "hostile_server", "transcripts")
)

SECURE_SUM_FAULTS = (
    Mutant(
        name="pair-mask-reused",
        fault="Two sites have one mask for all releases, so that the difference of two uploads of a site is that of "
        "its vectors but for its own masks.",
        file=MASKS,
        old='return self._derived(other, "mask", release, *sorted((site, other)))',
        new='return self._derived(other, "mask", *sorted((site, other)))',
        tests=(OF_MASKS, TRANSCRIPTS),
    ),
    Mutant(
        name="own-mask-reused",
        fault="A site's own mask is the same in each release: revealed for one, it is known for a late upload to "
        "another.",
        file=PARTY,
        old="        seeds[self._site] = os.urandom(SEED_BYTES)\n",
        new="        seeds[self._site] = pairs.mask_seed(self._site, self._site, release=0)\n",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="own-mask-missing",
        fault="Uploads carry the masks between sites alone: a late upload of a site that was counted as dropped is "
        "readable, since its masks were revealed to read the others' sum.",
        file=PARTY,
        old="masks(self._site, seeds, length=self._terms.length)",
        new="masks(self._site, {**seeds, self._site: bytes(SEED_BYTES)}, length=self._terms.length)",
        tests=(f"{HOSTILE}::test_a_late_upload_of_a_site_that_was_counted_as_dropped_stays_masked",),
    ),
    Mutant(
        name="mask-seed-of-32-bits",
        fault="A mask is made of 32 bits of its seed, as in Flower 1.41, so that all can be tried.",
        file=MASKS,
        old="ChaCha20(seed, bytes(16))",
        new="ChaCha20(seed[:4] * 8, bytes(16))",
        tests=(OF_MASKS,),
    ),
    Mutant(
        name="pair-mask-of-one-sign",
        fault="Both sites add the mask that they have in common, and it stays in the sum.",
        file=MASKS,
        old="            total -= stream\n",
        new="            total += stream\n",
        tests=(OF_MASKS,),
    ),
    Mutant(
        name="masks-without-a-session",
        fault="Masks and seals are those of two keys, whatever run and members they were announced for.",
        file=MASKS,
        old="salt, info = bytes.fromhex(self._session), ",
        new="salt, info = bytes(32), ",
        tests=(OF_MASKS,),
    ),
    Mutant(
        name="a-share-too-few",
        fault="The polynomial's degree is one too low: one site fewer than the threshold reads every secret.",
        file=SHARES,
        old="for _ in range(threshold - 1))",
        new="for _ in range(threshold - 2))",
        tests=(OF_SHARES,),
    ),
    Mutant(
        name="coefficients-from-a-part-of-the-field",
        fault="Coefficients have fewer bits than secrets, so that one share fewer than the threshold tells of them.",
        file=SHARES,
        old="secrets.randbelow(PRIME)",
        new="secrets.randbelow(2**128)",
        tests=(OF_SHARES,),
    ),
    Mutant(
        name="survivors-unsigned",
        fault="The lead says which sites confirmed the survivors, and is believed.",
        file=MESSAGES,
        old="if not is_signed(terms.members[site], CONFIRMATION, self.asked.to_bytes(), signature):",
        new="if not signature:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="a-confirmation-too-few",
        fault="One confirmation fewer than the threshold is enough to be helped, and two sets can be confirmed.",
        file=MESSAGES,
        old="        if len(self.confirmations) < terms.threshold:",
        new="        if len(self.confirmations) < terms.threshold - 1:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="both-kinds-of-share",
        fault="A site reveals its shares of all masks of each survivor: of all vectors each is read by itself.",
        file=MESSAGES,
        old="return [other for other in terms.sites if other == survivor or other not in survivors]",
        new="return [other for other in terms.sites if survivor in survivors]",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="two-sets-for-one-release",
        fault="A site confirms another set of survivors of the same release: the two sums differ by one site's vector.",
        file=PARTY,
        old="        if self._promised not in (None, asked):",
        new="        if self._promised is asked:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="helps-with-what-it-did-not-promise",
        fault="A site that promised one set helps with any other one that enough sites seem to have confirmed.",
        file=PARTY,
        old="        if asked.asked != self._promised:",
        new="        if self._promised is None and not self._release:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="an-old-release-again",
        fault="A site confirms survivors of a release that is over, and forgets that it had confirmed others.",
        file=PARTY,
        old="        if asked.release < self._release:\n            raise Rejected(Wrong.RELEASE_OVER)\n",
        new="",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="two-uploads-to-one-release",
        fault="A site masks a second vector for the same release, and their masks cancel in the difference.",
        file=PARTY,
        old="        if not self._release < release < MOST_RELEASES:",
        new="        if not self._release <= release < MOST_RELEASES:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="promise-not-kept",
        fault="A site confirms without having written which survivors it confirmed.",
        file=PARTY,
        old="        self._note(asked, confirmed=False)\n",
        new="",
        tests=(OF_SUM,),
    ),
    Mutant(
        name="confirmed-set-not-kept",
        fault="A site reveals its shares without having written which sum its vector is in: its ledger charges for the "
        "survivors that it was first told of, or for none.",
        file=PARTY,
        old="        self._note(asked.asked, confirmed=True)\n",
        new="",
        tests=(OF_SUM,),
    ),
    Mutant(
        name="seals-for-all-releases",
        fault="What a site sealed in one release opens in every other: shares of a release in which it had dropped are "
        "revealed in one that it survives.",
        file=MASKS,
        old='self._derived(other, "shares", release, sender, receiver)',
        new='self._derived(other, "shares", sender, receiver)',
        tests=(f"{HOSTILE}::test_shares_of_an_earlier_release_are_not_revealed_in_a_later_one", OF_MASKS),
    ),
    Mutant(
        name="cut-off-after-the-noise",
        fault="Each site cuts its noisy values off at the bound of the terms: the sum is then no function of what "
        "its noise protects.",
        file=PARTY,
        old="masked = residues(vector, self._terms.bits)",
        new="masked = residues(np.clip(vector, -self._terms.largest, self._terms.largest), self._terms.bits)",
        tests=(OF_SUM,),
    ),
    Mutant(
        name="a-sum-of-one",
        fault="The lead may ask for the sum of fewer survivors than the threshold, down to one.",
        file=AGREEMENT,
        old="        if len(survivors) < self.threshold:",
        new="        if not survivors:",
        tests=(HOSTILE,),
    ),
    Mutant(
        name="threshold-of-half",
        fault="The threshold is half of sites and colluders, not more than half: two sets can be confirmed.",
        file=THRESHOLD,
        old="(num_sites + colluders) // 2 + 1",
        new="(num_sites + colluders + 1) // 2",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="colluders-hold-enough-shares",
        fault="Where the server is taken for curious, its colluders may be as many as the threshold: they read all.",
        file=THRESHOLD,
        old='max(alone, colluders + 1) if server == "curious"',
        new='alone if server == "curious"',
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="limits-not-asked",
        fault="A site joins with the threshold that the lead chose.",
        file=AGREEMENT,
        old="        if terms.threshold < max(self.least_threshold, safe):",
        new="        if terms.threshold < safe:",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="roster-not-checked",
        fault="A member's identity is the key that the lead says, so that the lead can be every other site.",
        file=AGREEMENT,
        old="    if not terms.members.items() <= dict(roster).items():",
        new="    if not terms.members.keys() <= roster.keys():",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="key-unsigned",
        fault="A member's key is taken as it comes: the server sits between every two sites.",
        file=AGREEMENT,
        old="        if not is_signed(terms.members[self.site], KEY, self.message(), self.signature):",
        new="        if not self.signature:",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="key-of-another-run",
        fault="A key that a site announced for one run is taken in another, with other members or another threshold.",
        file=AGREEMENT,
        old="        if self.terms != terms.digest():",
        new="        if not self.terms:",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="session-without-its-keys",
        fault="Sites to which different keys were shown take themselves for members of one session.",
        file=AGREEMENT,
        old='canonical({"terms": terms.digest(), "keys": keys})',
        new='canonical({"terms": terms.digest()})',
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="keys-of-small-order",
        fault="A key under which every agreed secret is zero is taken for one.",
        file=MASKS,
        old="        X25519PrivateKey.generate().exchange(_public(text))\n",
        new="        _public(text)\n",
        tests=(OF_MASKS,),
    ),
    Mutant(
        name="no-room-for-the-sign",
        fault="The modulus has room for the size of a sum and not for its sign, so that a negative sum is read as a "
        "positive one.",
        file=AGREEMENT,
        old="return (num_sites * largest).bit_length() + 1",
        new="return (num_sites * largest).bit_length()",
        tests=(OF_AGREEMENT,),
    ),
    Mutant(
        name="wrong-shares-taken",
        fault="A site's wrong share goes into the sum's masks, and nobody sees that the sum is wrong.",
        file=SUMMATION,
        old="            if share is not None and shares.digest(share, *about, place) == digests[place]:",
        new="            if share is not None:",
        tests=(OF_SUM,),
    ),
    Mutant(
        name="a-dealer-believed",
        fault="Shares that do not fit together give some seed, and the sum is wrong without a word.",
        file=SUMMATION,
        old="        if shares.digest(seed, *about, 0) != digests[0] or seed >> 8 * SEED_BYTES:",
        new="        if seed >> 8 * SEED_BYTES:",
        tests=(OF_SUM,),
    ),
)
