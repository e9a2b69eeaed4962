"""Patterns for personal identifiers and encoding damage: matches and false positives."""

import pytest

from fedtune.lab.preparation.patterns import find_damage, find_identifiers, mask_identifiers

from ...cases import read_cases


@pytest.mark.parametrize(
    ("text", "kind", "identifier"),
    [
        ("write to a.b+c@mail.example.org today", "e-mail", "a.b+c@mail.example.org"),
        ("DE89 3704 0044 0532 0130 00 BITTE BALD", "IBAN", "DE89 3704 0044 0532 0130 00"),
        ("to GB82WEST12345698765432.", "IBAN", "GB82WEST12345698765432"),
        ("card 4111 1111 1111 1111, please", "card number", "4111 1111 1111 1111"),
        ("my number is 078-05-1120", "US social security number", "078-05-1120"),
        ("Steuer-ID 86 095 742 719", "German tax id", "86 095 742 719"),
        ("Anna, geb. 12.03.1980, sagt", "date of birth", "geb. 12.03.1980"),
        ("she was born on 3 May 1971", "date of birth", "born on 3 May 1971"),
        *(("from 192.168.17.4:", "IP address", "192.168.17.4"), ("at 2001:db8::1 it", "IP address", "2001:db8::1")),
        ("call +49 171 1234567", "phone number", "+49 171 1234567"),
        *(("Tel. 0171/1234567", "phone number", "0171/1234567"), ("(555) 234-5678", "phone number", "(555) 234-5678")),
    ],
)
def test_find_identifiers_matches_each_identifier_once(text: str, kind: str, identifier: str) -> None:
    assert [(kind_found, text[start:end]) for kind_found, start, end in find_identifiers(text)] == [(kind, identifier)]
    assert mask_identifiers(text) == (text.replace(identifier, f"[{kind}]"), [kind])


@pytest.mark.parametrize("text", read_cases(__file__, "no_identifiers"))
def test_harmless_text_is_not_masked(text: str) -> None:
    assert mask_identifiers(text) == (text, [])


def test_several_identifiers_in_one_text_are_masked() -> None:
    text = "a@b.de or 0171/1234567 or c@d.de"
    assert mask_identifiers(text) == ("[e-mail] or [phone number] or [e-mail]", ["e-mail", "phone number", "e-mail"])


@pytest.mark.parametrize("evil", ["1 ", "+1", "a.a@", "A1 ", "1:", "DE12A", "(", "1.1.1.", "a@b.de "])
def test_pattern_search_takes_linear_time(evil: str) -> None:
    find_identifiers(evil * 50_000)  # what looks back over the whole text would take hours


@pytest.mark.parametrize(("text", "kind"), read_cases(__file__, "damaged"))
def test_encoding_damage_is_detected(text: str, kind: str) -> None:
    assert list(find_damage(text)) == [kind]


@pytest.mark.parametrize("text", ["Für Sie: «É…»", "À la carte, ÇA VA?", "👩‍👩‍👧 🙂", "a\tb\r\nc", "文字 Ünïcode Æ"])
def test_valid_unicode_text_is_not_damage(text: str) -> None:
    assert list(find_damage(text)) == []
