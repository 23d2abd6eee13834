"""Reading a Hugging Face `config.json` strictly: what we do not understand, we do not guess.

    def read(fields: Fields) -> CausalLMConfig:
        decoder = DecoderConfig(width=fields.take("hidden_size", 4096), ...)
        fields.want("hidden_act", "silu")      # the only value that this code computes
        fields.done()                          # whatever nobody has read raises

Defaults are those of the original's configuration class, because its files leave them out.
"""

from collections.abc import Mapping
from typing import Any

from zoo.models.core.card import nearest
from zoo.models.core.errors import UsageError

_HARMLESS = """
    _attn_implementation_autoset _name_or_path _commit_hash architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout custom_pipelines decoder_start_token_id
    diversity_penalty do_sample dtype dropout dropout_rate early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label ignore_index initializer_factor initializer_range
    is_encoder_decoder attention_probs_dropout_prob keys_to_ignore_at_inference label2id layerdrop
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type projection_dropout remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_return_dict
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Fields that change no number of a forward pass in inference."""

_REQUIRED = object()


class Fields:
    """The fields of one configuration object; remembers which of them have been read.

    Attributes:
      name: of the object, for error messages, such as "llava.text_config".
    """

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name = name
        self._values = dict(values)
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    @property
    def model_type(self) -> str:
        """The architecture that the configuration names."""
        return str(self._values.get("model_type", ""))

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; `default` if it is absent or null.

        Raises:
          UsageError: it is absent and there is no default.
        """
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UsageError(f"{self.name}: the configuration lacks {key!r}")
            return default
        return tuple(value) if isinstance(value, list) else value

    def is_null(self, key: str) -> bool:
        """Whether `key` is there and null: for fields where null does not mean the default."""
        return key in self._values and self._values[key] is None

    def want(self, key: str, *allowed: Any) -> Any:
        """The value of `key`, which must be one of `allowed`; absent or null means the first.

        Raises:
          UsageError: it is something else, which this code does not compute.
        """
        value = self.take(key, allowed[0])
        if value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise UsageError(f"{self.name}: {key} is {value!r}; this zoo computes {listed} only")
        return value

    def sub(self, key: str, **defaults: Any) -> "Fields":
        """The configuration object under `key` (empty if absent), above `defaults`."""
        self._read.add(key)
        return Fields(f"{self.name}.{key}", {**defaults, **(self._values.get(key) or {})})

    def rest(self, **changes: Any) -> "Fields":
        """What nobody has read so far, with `changes`, as the configuration of a part whose fields
        stand beside those of the whole. It counts as read here.
        """
        left = {key: value for key, value in self._values.items() if key not in self._read}
        self._read.update(left)
        return Fields(self.name, {**left, **changes})

    def ignore(self, *keys: str) -> None:
        """Say that these fields, beyond `HARMLESS`, change no number here."""
        self._read.update(keys)

    def done(self) -> None:
        """Check that every field has been read.

        Raises:
          UsageError: naming the fields that nobody has read, because they may change the numbers.
        """
        left = sorted(
            key
            for key, value in self._values.items()
            if key not in self._read and key not in HARMLESS and value is not None
        )
        if left:
            listed = ", ".join(f"{key} = {self._values[key]!r}" for key in left)
            hint = nearest(left[0], sorted(self._read))
            raise UsageError(
                f"{self.name}: unknown fields that may change the numbers: {listed}{hint}"
            )
