"""How a recipe says which texts calibrate: where they are, what of them counts, and how they become rows of tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantkit.recipe.errors import problem
from quantkit.recipe.scheme import Part

BUILTIN = "builtin:"


class TextSource(Part):
    """Where texts come from."""

    data: str = Field(
        min_length=1,
        description="builtin:NAME; a .jsonl, .json, .parquet or .txt file, or a folder of them; or a dataset of the "
        "Hub, org/name or hub:name.",
    )
    subset: str | None = Field(
        default=None,
        min_length=1,
        description="Subset (configuration) of a Hub dataset; null: its only one, or default.",
    )
    split: str | None = Field(
        default=None, min_length=1, description="Split of a Hub dataset; null: train, or the only one that there is."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a Hub dataset; null: its main branch."
    )
    column: str | None = Field(
        default=None,
        min_length=1,
        description="Column or key of the text, or of a chat as a list of messages; null: the first of text, messages "
        "and conversations that a record has.",
    )

    @model_validator(mode="after")
    def _names_what_there_is(self) -> TextSource:
        if self.data.startswith(BUILTIN):
            for key in ("subset", "split", "revision"):
                if getattr(self, key) is not None:
                    raise problem("{key} goes with a dataset of the Hub; {data} has none", key=key, data=self.data)
        return self


class Calibration(TextSource):
    """The texts whose activations a method observes. Methods that observe nothing do not read them."""

    data: str = Field(
        default="builtin:pydocs",
        min_length=1,
        description="builtin:NAME; a .jsonl, .json, .parquet or .txt file, or a folder of them; or a dataset of the "
        "Hub, org/name or hub:name, of which only as much is read as the rows need.",
    )
    samples: int = Field(default=128, ge=1, le=10**6, description="Rows of tokens.")
    length: int = Field(default=2048, ge=2, le=2**20, description="Tokens a row.")
    packing: Literal["concat", "document"] = Field(
        default="concat", description="concat: documents one after another, cut into rows; document: one a row, padded."
    )
    min_tokens: int = Field(
        default=16,
        ge=1,
        le=2**20,
        description="With packing document: shorter documents are dropped, unless they fill a row.",
    )
    shuffle: int | None = Field(
        default=None,
        ge=0,
        le=2**63 - 1,
        description="Seed of the documents' order, each drawn from the next 10,000 of the source; null: its own order.",
    )
    chat_template: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: messages go through the tokenizer's chat template; never: their text is taken as it is.",
    )
    tokens: Literal["all", "assistant"] = Field(
        default="all",
        description="Tokens that enter statistics: all, or only what the assistant says in a chat. Padding never does.",
    )
    batch_size: int = Field(default=8, ge=1, le=2**16, description="Rows that go through a block at once.")
    hidden: Literal["auto", "device", "host", "disk"] = Field(
        default="auto",
        description="Where hidden states wait between blocks: on the device that computes, on the host to spare it, or "
        "in a file on the disk to spare both; auto decides by the memory that is free.",
    )
    expert_prior: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="How much an expert's few tokens are backed by all tokens: the latter count as this many tokens an "
        "input channel.",
    )
    all_experts: bool = Field(
        default=False,
        description="Observe every expert of a mixture on all tokens, not only on those that the router gives it; what "
        "the model computes does not change. Takes experts / active experts times as long.",
    )
    input_scale: Literal["absmax", "percentile", "mse"] = Field(
        default="absmax",
        description="Static scales of inputs: from the largest |x|, the 99.99th percentile, or of least squared error; "
        "NVFP4's global scale is always from the largest.",
    )

    @model_validator(mode="after")
    def _turns_need_a_template(self) -> Calibration:
        if self.tokens == "assistant" and self.chat_template == "never":
            raise problem("tokens: assistant needs the chat template, which chat_template: never leaves out")
        return self
