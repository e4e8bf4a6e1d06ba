"""What the short run leaves out, by kind: ``pytest -n 2`` keeps a proof of each.

A test that takes long and proves its point with one case says here which cases stay;
the others run with ``pytest -n 2 -m KIND``, and all in ``.ci/run``. The end of a run
names what it left out. Tests of a kind may also be marked where they stand.
"""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple


__all__ = ["KINDS", "REST", "RULES", "Rule", "kinds_of", "seconds_of", "stale"]

KINDS = {
    "variants": "further cases of what one case proves",
    "parity": "further comparisons with transformers, TRL, PEFT and torch",
    "kill": "processes that are killed, or asked to end, and go on",
    "fuzz": "thousands of broken files",
    "slow": "minutes rather than seconds, or gigabytes",
}

REST = " or ".join(KINDS)
"""The expression that selects exactly what the short run leaves out."""


class Rule(NamedTuple):
    """Which cases of a test are of a kind: all but those kept."""

    kind: str
    kept: tuple[str, ...] = ()
    """Patterns of the cases that the short run keeps, with ``!`` those that fit it not;
    none for the whole test."""


RULES: dict[str, dict[str, Rule]] = {
    # One objective of every group in every layout; of the coupled ones two.
    "objectives/test_layouts.py": {
        "test_the_layout_changes_nothing": Rule(
            "variants",
            ("dpo2d0", "tdpo2", "sepo", "mix"),
        ),
        "test_accumulation_is_one_large_batch": Rule("variants", ("aot",)),
        "test_a_cached_reference_is_the_live_one": Rule("variants"),
    },
    "objectives/test_objectives.py": {
        "test_agrees_with_the_formula": Rule("variants", ("!*,f_divergence_type=*",)),
        "test_stays_finite": Rule("variants", ("!*,f_divergence_type=*",)),
    },
    "evaluation/test_score.py": {
        "test_every_option_of_2d_dpo": Rule(
            "variants", ("{}", "*vanilla*", "*mean1*", "*top_k*")
        ),
    },
    # The same run on five exchanges is kept.
    "evaluation/tasks/test_dream_observations.py": {
        "test_who_has_read_the_answers_is_right_in_everything": Rule("slow"),
    },
    # The board's figures of one model; by the fits alone, of all three.
    "evaluation/tasks/test_alpaca_eval.py": {
        "test_all_figures_of_annotations": Rule("variants", ("claude*",)),
    },
    "evaluation/boards/test_length_control.py": {
        "test_cross_validation_finds_the_board_s_cost": Rule("variants", ("gemma*",)),
        "test_how_far_the_other_variants_are": Rule("variants", ("gemma*",)),
    },
    # Schemas hold choices and patterns.
    "generation/test_structure.py": {
        "test_texts_fit_and_have_the_probabilities_of_what_may_follow": Rule(
            "variants", ("schema",)
        ),
        "test_masks_are_exact_along_every_way": Rule("variants", ("regex",)),
        "test_a_mesh_changes_no_text": Rule("variants"),
    },
    # Three axes of devices at once; more devices than heads, with experts.
    "parallel/test_sharding.py": {
        "test_a_mesh_gives_the_single_device_s_loss_and_gradients": Rule(
            "variants", ("lora-{'tensor': 2, *",)
        ),
    },
    "feedback/test_thinking.py": {
        "test_a_round_trains_on_samples_that_think": Rule("slow"),
    },
    # Of families that see, the one with positions of three axes.
    "judging/test_local_pictures.py": {
        name: Rule("parity", ("qwen2_5_vl*",))
        for name in (
            "test_likelihood_is_that_of_the_whole_prompt",
            "test_a_plain_prompt_shows_its_picture_where_it_stands",
            "test_a_choice_is_made_with_the_pictures",
        )
    }
    | {
        "test_scores_by_choice_depend_on_the_picture": Rule("parity", ("llava",)),
        "test_what_is_written_is_the_engines_text_with_the_pictures": Rule("parity"),
        "test_a_picture_that_has_changed_stops_the_run": Rule(
            "variants", ("llava-likelihood", "llava-json")
        ),
    },
    "generation/test_question_pictures.py": {
        "test_log_probs_are_those_of_transformers": Rule("parity", ("qwen2_5_vl",)),
    },
    "judging/test_writing_judge.py": {
        "test_a_verdict_does_not_depend_on_the_others": Rule("variants"),
    },
    "training/test_longer.py": {
        "test_it_ends_as_if_the_larger_number_had_been_meant": Rule("slow"),
    },
    "generation/test_recompute.py": {
        "test_a_model_without_a_cache_is_sampled_from": Rule("slow"),
    },
    "feedback/test_rounds.py": {
        "test_an_endpoint_judges_and_what_it_fails_is_in_no_pair": Rule("slow"),
        "test_kills_at_every_stage_change_nothing": Rule("kill"),
        "test_a_run_from_before_risks_were_graded_counts_them": Rule("slow"),
    },
    "training/test_image_features.py": {
        "test_trains_as_the_run_that_recomputes": Rule("variants", ("adapters",)),
        "test_a_mesh_of_two_devices_changes_nothing": Rule("variants"),
        "test_exports_are_whole": Rule("variants"),
        "test_a_reference_with_another_tower_is_refused": Rule("variants"),
        "test_going_on_under_other_versions_is_said": Rule("variants"),
        "test_scores_are_those_of_the_recomputing": Rule("variants"),
        "test_goes_on_where_filling_was_interrupted": Rule("slow"),
        "test_a_loaded_model_is_encoded_by_its_own_weights": Rule("variants"),
        "test_what_changed_is_encoded_anew": Rule("slow"),
    },
    "feedback/test_pictured_rounds.py": {
        "test_a_round_samples_judges_trains_and_reports": Rule("slow"),
        "test_a_picture_that_has_changed_is_no_going_on": Rule("slow"),
        "test_risks_look_at_both_at_the_picture_and_at_the_words": Rule("slow"),
        "test_claims_are_verified_with_the_picture": Rule("slow"),
        "test_rules_need_no_eyes": Rule("slow"),
        "test_kills_change_nothing": Rule("kill"),
    },
    "feedback/test_safety_rounds.py": {
        "test_a_round_is_accepted_and_one_that_refuses_is_not": Rule("kill"),
    },
    "feedback/test_disentangle.py": {
        "test_kills_and_a_full_disk_lose_nothing": Rule("kill"),
        "test_a_checkpoint_in_this_process": Rule("slow"),
    },
    "feedback/test_distill_file.py": {
        "test_kills_and_a_full_disk_lose_nothing": Rule("kill"),
    },
    # What is made in this process, of pictures too, is generate's own text.
    "feedback/test_distill_teacher.py": {
        "test_a_run_that_goes_on_writes_the_same_bytes": Rule("slow"),
        "test_a_student_trains_and_sees_no_word_of_the_context": Rule("slow"),
    },
    "feedback/test_own_judge.py": {
        "test_rounds_take_a_judge_and_a_decomposer_as_objects": Rule("slow"),
    },
    "training/test_own_parts.py": {
        "test_accumulation_and_a_mesh_do_as_for_the_built_in": Rule("variants"),
        "test_a_run_of_own_parts_goes_on_and_knows_another_objective": Rule("variants"),
        "test_an_objective_of_two_terms_and_a_reference_free_one": Rule("variants"),
    },
    "notebooks/test_notebooks.py": {
        "test_a_notebook_runs": Rule("slow", ("06_edit_and_export", "07_own_judge")),
    },
    "data/test_trl_parity.py": {
        "test_every_template_of_trl": Rule(
            "parity",
            (
                *("qwen3", "qwen2_5", "llama3_2", "gemma3", "glm4moe", "smolvlm"),
                *("deepseek_r1_distill", "gptoss", "phi3"),
            ),
        ),
    },
    # Each family is compared with transformers once, by its log-probabilities.
    "models/test_families.py": {
        "test_log_probs_are_those_of_transformers": Rule(
            "parity",
            (
                *("llama longrope", "mistral", "qwen2", "qwen3", "qwen3_moe"),
                *("mixtral", "gemma?", "phi3", "olmo2", "smollm3", "granite"),
            ),
        ),
        "test_shards_in_half_precision_come_back_to_the_last_bit": Rule(
            "variants", ("mistral", "qwen3_moe", "gemma3", "phi3")
        ),
    },
    # The decoders are compared by their words; of their scores one with each norm.
    "judging/test_reward_judge.py": {
        "test_scores_are_those_of_transformers": Rule("parity", ("llama", "gemma2")),
    },
    "models/test_llama.py": {
        "test_log_probs_are_those_of_transformers": Rule(
            "parity", ("chat-plain", "plain-text-biases", "chat-tied")
        ),
        "test_remat_and_groups_change_nothing": Rule(
            "variants", ("one-dots", "two-full")
        ),
        "test_blocked_attention_equals_the_plain_formula": Rule(
            "variants", ("3", "64")
        ),
    },
    "models/test_experts.py": {
        "test_a_mesh_gives_the_same": Rule("variants"),
        "test_training_reports_the_balance": Rule("variants"),
        "test_the_balance_is_that_of_transformers": Rule("parity", ("qwen3_moe",)),
        "test_peft_scores_adapted_experts_alike": Rule("parity", ("qwen3_moe",)),
        "test_adapted_experts_merge_and_come_back": Rule("variants", ("static",)),
    },
    # Positions of three axes, windows, pictures of any size.
    "generation/test_pictures.py": {
        "test_greedy_text_is_that_of_transformers": Rule("parity", ("qwen2_5_vl",)),
        "test_a_mesh_changes_no_text": Rule("variants"),
    },
    "generation/test_engine.py": {
        "test_greedy_text_is_that_of_transformers": Rule(
            "parity", ("llama llama3", "qwen2", "mixtral", "gemma3")
        ),
        "test_greedy_text_with_an_adapter_is_that_of_the_full_forward_pass": Rule(
            "variants", ("H2LPT*",)
        ),
    },
    # Adapters: LoRA, a gate, a prefix, a hybrid.
    "models/test_decode.py": {
        "test_decoding_equals_the_full_forward_pass": Rule(
            "variants",
            ("NoAdapter*", "LoRA*'sequence', *", "Prefix*separate*'token')", "H2LPT*"),
        ),
    },
    "adapters/test_prefix.py": {
        "test_packing_changes_nothing": Rule(
            "variants", ("concat-token", "separate-sequence")
        ),
        "test_remat_changes_no_gradient": Rule("variants", ("full",)),
    },
    "adapters/test_files.py": {
        "test_an_adapter_comes_back": Rule(
            "variants", ("lora", "dora", "prefix", "gated", "h2lpt")
        ),
        "test_torch_users_get_what_score_says": Rule("parity", ("hlpt",)),
    },
    "adapters/test_saved.py": {
        "test_our_own_runs_train_modules_whole": Rule("variants", ("untied",)),
        "test_numbers_are_pefts_in_and_out": Rule(
            "parity",
            ("head-tied", "both-untied", "tokens-tied", "some layers-un*", "much-*"),
        ),
        "test_merged_weights_are_pefts": Rule("parity", ("norms-*", "tokens-*")),
    },
    "adapters/test_torch_loader.py": {
        "test_logits_are_those_of_jax": Rule(
            "parity", ("concat-token", "separate-sequence", "concat-mean")
        ),
    },
    "checkpoints/test_export.py": {
        "test_an_adapter_of_peft_gives_the_same_weights": Rule(
            "parity", ("everything", "ranks rslora", "dora", "embeddings")
        ),
        "test_an_adapter_goes_through_both_ways": Rule(
            "variants", ("everything", "ranks rslora", "dora", "embeddings")
        ),
    },
    # One scheme of each layout; act order, zero points.
    "checkpoints/test_packed.py": {
        "test_log_probs_are_those_of_the_plain_weights": Rule(
            "parity", ("fp8 blocks", "fp8 channel", "packed", "awq", "gptq act*")
        ),
    },
    "checkpoints/test_convert.py": {
        "test_it_loads_like_the_source": Rule(
            "variants", ("None-auto", "groups1-float32", "groups2-bfloat16")
        ),
    },
    "adapters/test_hybrid.py": {
        "test_only_adapter_leaves_are_trained": Rule("variants", ("hlpt",)),
        "test_group_boundaries_change_nothing": Rule("variants"),
    },
    "adapters/test_gates.py": {
        "test_a_token_changes_no_earlier_logit": Rule(
            "variants", ("LoRA*'sequence', *", "Prefix*separate*'none')", "HLPT*")
        ),
    },
    # Models that see: of each family something, of each way one.
    "vision/test_adapters.py": {
        "test_peft_loads_it_with_exactly_these_modules": Rule(
            "parity", ("qwen2_5_vl-{}",)
        ),
        "test_it_loads_what_peft_wrote": Rule("parity", ("4-llava",)),
    },
    "vision/test_trained_weights.py": {
        "test_they_train_beside_an_adapter": Rule("variants"),
        "test_the_connector_alone": Rule("variants"),
    },
    "vision/test_files.py": {
        "test_it_comes_out_bit_for_bit": Rule(
            "variants", ("llava-published", "idefics3-*", "qwen2_5_vl-published")
        ),
        "test_transformers_loads_what_is_merged": Rule("parity", ("qwen2_5_vl",)),
        "test_a_converted_base_stands_for_it": Rule("variants", ("llava",)),
        "test_a_run_from_a_converted_base": Rule("variants"),
    },
    "vision/test_adapted_layers.py": {
        "test_a_tower_of_codes": Rule("variants", ("llava-*",)),
        "test_prefixes_of_the_decoder": Rule("variants"),
        "test_a_mesh_gives_the_single_device_s_loss_and_gradients": Rule("variants"),
    },
    # Quantised bases: both codes, an adapter, a hybrid.
    "models/test_quantised.py": {
        "test_log_probs_are_those_of_the_unpacked_weights": Rule(
            "variants", ("int8-lora", "nf4-none")
        ),
        "test_a_mesh_gives_the_single_device_s_log_probs": Rule(
            "variants", ("nf4-{'tensor': 2, *",)
        ),
        "test_codes_are_those_of_a_slow_float64_implementation": Rule(
            "variants", ("1-*", "65-*")
        ),
        "test_gradients_are_those_of_the_unpacked_weights": Rule(
            "variants", ("int8-lora-none",)
        ),
        "test_a_step_needs_no_memory_for_unpacked_layers": Rule("variants", ("none",)),
    },
    "training/test_quantised_runs.py": {
        "test_another_reference_is_held_alike": Rule("variants"),
        "test_exports_are_for_the_unquantised_model": Rule("variants"),
        "test_score_holds_the_base_as_the_run_did": Rule("variants"),
    },
    "training/test_objective_runs.py": {
        "test_token_weights_from_two_models": Rule("variants"),
        "test_kto_on_labelled_completions": Rule("variants"),
        "test_kto_takes_pairs_apart": Rule("variants"),
        "test_a_mix_adds_up": Rule("variants"),
        "test_supervised_then_sequential_kl": Rule("variants"),
    },
    # Killed in the short run: a generate.
    "training/test_resume.py": {
        "test_base_weights_by_pattern": Rule("variants", ("some",)),
        "test_killed_again_and_again_it_ends_the_same": Rule("kill"),
        "test_the_cached_reference_is_used_and_a_stale_one_refused": Rule("variants"),
        "test_a_full_disk_loses_nothing": Rule("kill"),
        "test_sigterm_saves_and_asks_to_be_run_again": Rule("kill"),
        "test_a_run_on_a_small_disk_goes_on_on_a_larger_one": Rule("kill"),
    },
    "training/test_step.py": {
        "test_accumulation_is_one_large_batch": Rule("variants"),
        "test_dropout_is_for_the_policy_in_training_alone": Rule("variants"),
    },
    "cli/test_errors.py": {
        "test_any_values_give_a_config_or_a_user_error": Rule("fuzz"),
        "test_any_file_of_options_gives_a_config_or_a_user_error": Rule("fuzz"),
    },
    "data/test_records.py": {
        "test_any_file_gives_records_or_a_user_error": Rule("fuzz"),
    },
    "data/test_tfds_builders.py": {
        "test_grain_workers_read_a_set_without_tensorflow": Rule("slow"),
    },
    "data/test_kept_pairs.py": {
        "test_a_kill_while_writing_leaves_nothing_broken": Rule("kill", ("7",)),
    },
    # Parts of a file: in the short run texts alone, and nobody is killed.
    "generation/test_shards.py": {
        "test_a_killed_part_goes_on": Rule("kill"),
        "test_parts_with_pictures": Rule("variants"),
        "test_more_parts_than_prompts": Rule("variants"),
    },
    "feedback/test_shards.py": {
        "test_a_killed_part_goes_on_by_the_command_that_join_says": Rule("kill"),
    },
    "evaluation/test_joining.py": {
        "test_a_killed_part_goes_on_by_the_command_that_join_says": Rule("kill"),
        "test_a_model_in_this_process": Rule("variants"),
    },
    "generation/test_picture_files.py": {
        "test_lines_keep_pictures_and_a_stopped_run_goes_on": Rule("variants"),
    },
    "generation/test_files.py": {
        "test_an_adapter_on_top": Rule("variants", ("LoRAConfig*",)),
    },
    "cli/test_judge.py": {
        "test_two_kills_and_a_full_disk_lose_nothing": Rule("kill"),
    },
    "models/test_attention.py": {
        "test_a_kernel_gives_the_plain_formula_s_values_and_gradients": Rule(
            "variants", ("xla-7-5.0", "splash-150-2.0", "cudnn-*")
        ),
    },
    "training/test_attention.py": {
        "test_a_model_computes_the_same_with_splash": Rule("variants", ("None",)),
    },
    "generation/test_server.py": {"test_sigterm_drains": Rule("kill")},
    # Each layout of pictures, and of the losses one of pairs and one of single ones.
    "vision/test_log_probs.py": {
        "test_score_says_what_transformers_says": Rule(
            "parity", ("llava", "smolvlm", "qwen2_5_vl")
        ),
        "test_rows_of_one_pair": Rule("parity"),
        "test_two_by_four_devices": Rule("variants", ("fsdp-llava",)),
        "test_pictures_of_a_data_set": Rule("parity"),
    },
    "vision/test_gradients.py": {
        "test_gradients_of_all_weights_are_torchs": Rule("parity", ("sft-qwen2_5_vl",)),
    },
    "vision/test_identities.py": {
        "test_order_budgets_and_packing_change_nothing": Rule("variants", ("smolvlm",)),
        "test_another_picture_changes_its_own_pair_alone": Rule(
            "variants", ("qwen2_5_vl",)
        ),
        "test_a_frozen_tower_is_run_once": Rule("variants", ("llava-*",)),
    },
    "vision/test_runs.py": {
        "test_an_objective_trains_on_pictures": Rule("variants", ("dpo2d",)),
        "test_all_is_trained_and_evaluated_with_and_without_pictures": Rule("variants"),
    },
    # Launchers: of the statuses one of each row, of several slices and hosts one.
    "tpu_scripts/test_tpu_vm.py": {
        "test_a_preemption_whatever_the_status": Rule("variants", ("1", "42")),
        "test_it_runs_again_without_limit_on_a_machine_that_is_there": Rule(
            "variants", ("42",)
        ),
        "test_any_other_status_is_the_scripts_and_its_output_kept": Rule(
            "variants", ("1",)
        ),
        "test_the_count_of_lost_connections_is_of_those_in_a_row": Rule("variants"),
        "test_a_missing_setting_is_named_before_any_call": Rule(
            "variants", ("--zone",)
        ),
        "test_more_hosts_than_gcloud_starts_at_once_are_refused": Rule(
            "variants", ("v6e-256*",)
        ),
    },
    "tpu_scripts/test_slurm.py": {
        "test_it_goes_back_into_the_queue_without_limit": Rule("variants", ("42",)),
        "test_any_other_status_is_the_jobs": Rule("variants", ("1",)),
    },
    "tpu_scripts/test_end_to_end.py": {
        "test_term_to_one_host_changes_no_result": Rule("variants", ("1",)),
    },
    # What a reader refuses is tested by name; these look for what nobody thought of.
    "checkpoints/test_load.py": {
        "test_configs_with_other_values": Rule("fuzz"),
        "test_flipped_and_cut_headers": Rule("fuzz"),
        "test_headers_with_other_values": Rule("fuzz"),
    },
    "feedback/test_segmenters.py": {
        "test_the_time_is_in_proportion_to_the_text": Rule(
            "variants", (".", "(a. ", "``` ")
        ),
        "test_many_marks_take_seconds": Rule("variants", (".",)),
        "test_real_answers_are_their_segments_and_white_space": Rule("slow"),
    },
}

SECONDS = {
    "feedback/test_rounds.py": 150,
    "training/test_resume.py": 120,
    "objectives/test_layouts.py": 200,
    "models/test_quantised.py": 150,
    "parallel/test_sharding.py": 115,
    "generation/test_engine.py": 115,
    "adapters/test_files.py": 105,
    "adapters/test_prefix.py": 70,
    "models/test_experts.py": 70,
    "models/test_llama.py": 65,
    "objectives/test_objectives.py": 65,
    "models/test_families.py": 65,
    "feedback/test_segmenters.py": 55,
    "checkpoints/test_load.py": 55,
    "training/test_step.py": 50,
    "training/test_objective_runs.py": 50,
    "adapters/test_saved.py": 40,
    "adapters/test_hybrid.py": 40,
    "generation/test_server.py": 35,
    "models/test_decode.py": 35,
    "training/test_quantised_runs.py": 35,
    "checkpoints/test_convert.py": 35,
    "generation/test_files.py": 30,
    "checkpoints/test_export.py": 30,
    "vision/test_log_probs.py": 60,
    "vision/test_gradients.py": 45,
    "vision/test_identities.py": 40,
    "vision/test_runs.py": 40,
    "models/test_attention.py": 30,
}
"""What the longest files take in all, so that a run begins with them."""


def seconds_of(item: Any) -> int:
    """Return what the file of a collected test takes, 0 where that is not much."""
    return SECONDS.get(_place_of(item)[0], 0)


def kinds_of(item: Any) -> set[str]:
    """Return the kinds of a collected test: by its marks and by the rules."""
    found = {mark.name for mark in item.iter_markers() if mark.name in KINDS}
    file, test, case = _place_of(item)
    rule = RULES.get(file, {}).get(test)
    if rule is not None and not any(_fits(case, kept) for kept in rule.kept):
        found.add(rule.kind)
    return found


def stale(items: Iterable[Any]) -> list[str]:
    """Return rules that no test answers to, or that keep a case that is not there."""
    cases: dict[tuple[str, str], list[str]] = {}
    for item in items:
        file, test, case = _place_of(item)
        cases.setdefault((file, test), []).append(case)
    wrong = []
    for file, rules in RULES.items():
        for test, rule in rules.items():
            there = cases.get((file, test), [])
            for kept in rule.kept or ("*",):
                if not any(_fits(case, kept) for case in there):
                    wrong.append(f"{file}::{test}[{kept}]")
    return wrong


def _fits(case: str, pattern: str) -> bool:
    if pattern.startswith("!"):
        return not fnmatch.fnmatchcase(case, pattern[1:])
    return fnmatch.fnmatchcase(case, pattern)


def _place_of(item: Any) -> tuple[str, str, str]:
    """Return file below tests/, function and case of a collected test."""
    file, _, rest = item.nodeid.removeprefix("tests/").partition("::")
    spec = getattr(item, "callspec", None)
    return file, rest.partition("[")[0], "" if spec is None else spec.id
