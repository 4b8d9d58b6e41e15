"""Flags and `--help` are generated from the dataclasses."""

import dataclasses
import re

import pytest

from megatron_memory.config import Config, parse_arguments
from megatron_memory.config.flags import all_flags, all_spellings, help_text, opposite
from megatron_memory.config.option import field_docstrings


def test_every_field_has_a_flag():
    num_fields = sum(len(dataclasses.fields(field.type)) for field in dataclasses.fields(Config))
    assert len(all_flags()) == num_fields


def test_every_field_has_a_docstring():
    for field in dataclasses.fields(Config):
        assert field_docstrings(Config)[field.name]
        docstrings = field_docstrings(field.type)
        for inner in dataclasses.fields(field.type):
            assert len(docstrings.get(inner.name, "")) > 5, f"{field.name}.{inner.name}"


def test_help_shows_every_flag_with_its_text():
    text = " ".join(help_text().split())
    for flag in all_flags().values():
        entry = re.search(rf"{re.escape(flag.spelled)}[ ,]", text)
        assert entry, f"{flag.spelled} is not in --help"
        # argparse breaks lines after hyphens; compare without white space.
        assert "".join(flag.text.split()) in "".join(text.split()), flag.spelled


def test_help_shows_defaults_choices_and_requirements():
    text = "".join(help_text().split())
    assert "--memory-variant{pkm,memory+,peer}" in text
    assert "(default:memory+)" in text
    assert "Valuesthateachheadreadsforatoken.(default:32)" in text
    assert "Numberofdecoderlayers.(required)" in text
    assert "(default:halfof--memory-value-dim)" in text


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_printed_even_where_flags_are_missing(word, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments([word])
    assert exit_info.value.code == 0
    assert "--memory-layers" in capsys.readouterr().out


def test_memory_flags_carry_their_prefix():
    flags = all_flags()
    assert flags["memory_top_k"].spelled == "--memory-top-k"
    assert flags["memory_value_lr"].component == "memory"
    assert all(
        key.startswith("memory_") == (flag.component == "memory") for key, flag in flags.items()
    )


def test_every_switch_has_an_opposite():
    assert opposite("bf16") == "no_bf16"
    assert opposite("no_save_rng") == "save_rng"
    for key, flag in all_flags().items():
        if flag.value_type.kind == "bool":
            assert all_spellings()[opposite(key)].value is False
