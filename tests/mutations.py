"""Faults that tests must see, each with the tests that do (tests/mutate.py)."""

from __future__ import annotations

from mutate import Mutation

CHECKPOINT, RUN, TRAINER = "tempact/runs/checkpoint.py", "tempact/runs/run.py", "tempact/trainer.py"
RESUME = "tempact/runs/resume.py"
CHECKPOINTS, ENDINGS, TRAINING = "tests/runs/test_checkpoint.py", "tests/runs/test_endings.py", "tests/test_trainer.py"


def faults(file: str, tests: str, *pairs: tuple[str, str, str]) -> list[Mutation]:
    """Faults (test, line, fault) of one file, seen by tests of another."""
    return [Mutation(file, line, fault, (f"{tests}::{test}",)) for test, line, fault in pairs]


MUTATIONS = [
    *faults(
        CHECKPOINT,
        CHECKPOINTS,
        (
            "test_a_pickle_with_the_right_hashes_is_passed_over_and_never_executed",
            'file, map_location="cpu", weights_only=True)\n\n\ndef new_course',
            'file, map_location="cpu", weights_only=False)\n\n\ndef new_course',
        ),
        (
            "test_a_pickle_with_the_right_hashes_is_passed_over_and_never_executed",
            "weights_only=True, mmap=True",
            "weights_only=False, mmap=True",
        ),
        ("test_the_manifest_lists_exactly_the_files_that_are_there", "if NEEDED - files.keys():", "if not files:"),
        (
            "test_the_manifest_lists_exactly_the_files_that_are_there",
            "or name in files or name ==",
            "or files or name ==",
        ),
        ("test_a_renamed_checkpoint_is_not_taken_for_another_step", "if step != step_of(_stem(path)):", "if not step:"),
        ("test_a_link_is_no_part_of_a_checkpoint", "if file.is_symlink() or", "if"),
        ("test_a_save_recovers_first_and_syncs_all_it_writes", "        recover(run_folder)\n", ""),
        ("test_a_save_recovers_first_and_syncs_all_it_writes", "    for file in files:\n        sync(file)\n", ""),
        ("test_a_save_recovers_first_and_syncs_all_it_writes", "    sync(final.parent)\n", ""),
        (
            "test_what_belongs_to_another_course_is_set_aside_and_the_newest_save_stays",
            "        set_aside(run_folder, step, course)\n",
            "",
        ),
        (
            "test_what_belongs_to_another_course_is_set_aside_and_the_newest_save_stays",
            "if later <= step and _course(manifest) == course:",
            "if later <= step:",
        ),
    ),
    *faults(
        RESUME,
        CHECKPOINTS,
        (
            "test_a_resume_from_elsewhere_does_not_mix_two_runs",
            "if present and not found.within",
            "if not found.within",
        ),
        (
            "test_a_resume_from_elsewhere_does_not_mix_two_runs",
            "if present and not found.within",
            "if not present and not found.within",
        ),
        (
            "test_keys_of_other_versions_are_named_and_take_their_defaults",
            "    before |= then\n",
            "    before = then\n",
        ),
        (
            "test_a_changed_length_that_moves_the_learning_rates_is_said",
            'if "trainer.iterations" in changed and',
            'if "trainer.iterations" not in changed and',
        ),
    ),
    Mutation(
        "tempact/files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        (f"{CHECKPOINTS}::test_a_save_recovers_first_and_syncs_all_it_writes",),
    ),
    Mutation(
        "tempact/config.py",
        "lr: float = field(metadata=described(TRAINING",
        "lr: float = field(metadata=described(RUN",
        (f"{CHECKPOINTS}::test_a_learning_rate_is_not_changed_by_a_resume",),
    ),
    Mutation(
        "tempact/config.py",
        "lr_end: float = key(1.0, TRAINING",
        "lr_end: float = key(1.0, RUN",
        (f"{CHECKPOINTS}::test_a_learning_rate_is_not_changed_by_a_resume",),
    ),
    *faults(
        TRAINER,
        TRAINING,
        ("test_two_updates_take_halves_and_only_the_second_is_off_policy", "{f'@{i + 1}' if i else ''}", ""),
        ("test_weights_that_a_step_made_infinite_are_taken_back", "elif not policy.finite():", "elif policy is None:"),
        ("test_a_rollback_takes_back_what_is_not_confirmed_to_the_bit", "        self.load_state(state)\n", ""),
        (
            "test_a_rollback_takes_back_what_is_not_confirmed_to_the_bit",
            'value.detach().to("cpu", copy=True)',
            "value.detach()",
        ),
        (
            "test_iterations_from_which_nothing_can_be_learned_end_the_run",
            "0 if bool(advantages[name].any()) else",
            "0 if advantages[name].numel() else",
        ),
        (
            "test_one_scored_group_starts_the_count_of_idle_iterations_anew",
            "0 if bool(advantages[name].any()) else",
            "self.idle[name] if bool(advantages[name].any()) else",
        ),
    ),
    *faults(
        "tempact/executor/executor.py",
        TRAINING,
        (
            "test_videos_that_are_not_numbers_have_no_score_and_harm_no_other",
            "return ~(low.isfinite() & high.isfinite())",
            "return ~low.isfinite()",
        ),
        (
            "test_videos_that_are_not_numbers_have_no_score_and_harm_no_other",
            "values.nan_to_num_(0.0, 0.0, 0.0)",
            "pass",
        ),
    ),
    *faults(
        RUN,
        ENDINGS,
        ("test_an_unexpected_exception_saves_the_last_whole_iteration", "        trainer.rollback()\n", ""),
        ("test_a_second_signal_gives_the_iteration_up_and_loses_nothing_before_it", "        trainer.rollback()\n", ""),
        (
            "test_a_signal_before_the_first_step_saves_the_state_before_the_iteration",
            "                stop.open()\n",
            "                pass\n",
        ),
        (
            "test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside",
            "        if set_aside(folder, checkpoint.step, checkpoint.course):",
            "        if not folder:",
        ),
        ("test_several_processes_of_torchrun_are_refused_in_one_line", '    if ranks != "1":', "    if not ranks:"),
    ),
    *faults(
        "tempact/models/wan/checkpoints/files.py",
        "tests/models/test_checkpoints_stored.py",
        ("test_no_reader_runs_the_code_of_a_pickle", "weights_only=True, mmap", "weights_only=False, mmap"),
        ("test_fp8_is_loaded_and_converted_as_it_is", "tensor.float().isfinite()", "tensor.isfinite()"),
        ("test_the_entry_that_was_taken_is_told", "if entries and len(models) == 1", "if len(models) == 9"),
    ),
    *faults(
        "tempact/shapeworld/pretraining/__init__.py",
        "tests/shapeworld/test_pretraining.py",
        ("test_the_state_of_an_interrupted_course_runs_no_code", "weights_only=True", "weights_only=False"),
    ),
    *faults(
        "tempact/models/adapters.py",
        "tests/models/test_adapters.py",
        ("test_what_cannot_be_peft_is_refused_by_both_readers", "    require_finite(state, file)\n", ""),
        ("test_what_cannot_be_peft_is_refused_by_both_readers", "if start not in PLAIN_STARTS:", "if not file:"),
        ("test_peft_matches_names_and_so_do_we", "get_pattern_key(settings.alpha_pattern, name)", "name"),
        ("test_peft_matches_names_and_so_do_we", "state[up].double() * ratio", "state[up]"),
        ("test_peft_matches_names_and_so_do_we", "math.sqrt(rank) if settings.use_rslora else rank", "rank"),
    ),
    *faults(
        "tempact/models/wan/checkpoints/lora.py",
        "tests/models/test_lora_files.py",
        ("test_what_cannot_be_merged_is_refused", "    require_finite(state, file)\n", ""),
        ("test_every_tools_file_is_merged", "scale=alpha.item() / effects[module].rank", "scale=1.0"),
    ),
]
