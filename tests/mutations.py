"""Faults that tests must see, each with the tests that do (tests/mutate.py)."""

from __future__ import annotations

from mutate import Mutation

CHECKPOINT, RUN, TRAINER = "tempact/runs/checkpoint.py", "tempact/runs/run.py", "tempact/trainer.py"
RESUME = "tempact/runs/resume.py"
CHECKPOINTS, ENDINGS, TRAINING = "tests/runs/test_checkpoint.py", "tests/runs/test_endings.py", "tests/test_trainer.py"

EQUAL, BITS = "tests/distributed/test_equal.py", "test_several_processes_have_the_bits_of_one"
GROUPS, BEST_OF = "tests/distributed/test_groups.py", "tests/executor/test_best_of.py"


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
        (
            "test_a_renamed_checkpoint_is_not_taken_for_another_step",
            "if step != step_of(stem_of(path)):",
            "if not step:",
        ),
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
            "if later <= step and course_of(path) == course:",
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
        "tempact/meter.py",
        "tests/test_meter.py",
        ("test_each_phase_has_its_own_peak", "            torch.cuda.reset_peak_memory_stats()\n", ""),
        ("test_each_phase_has_its_own_peak", "= max(Meter.peak_gib, peak)", "= peak"),
        ("test_each_phase_has_its_own_peak", "        self._running = []\n        self._lap()", "        self._lap()"),
        ("test_an_inner_phase_takes_its_seconds", 'one go on."""\n        self._lap()\n', 'one go on."""\n'),
        ("test_each_phase_has_its_own_peak", "!= (0, 0)", "== (0, 0)"),
    ),
    *faults(
        TRAINER,
        TRAINING,
        ("test_two_updates_take_halves_and_only_the_second_is_off_policy", "{f'@{i + 1}' if i else ''}", ""),
        ("test_weights_that_a_step_made_infinite_are_taken_back", "elif not policy.finite():", "elif policy is None:"),
        (
            "test_a_rollback_takes_back_what_is_not_confirmed_to_the_bit",
            '            self.load_state(before["state"])\n',
            "",
        ),
        (
            "test_a_rollback_takes_back_what_is_not_confirmed_to_the_bit",
            "return place.copy_(value.detach(), non_blocking=True)",
            "return value.detach()",
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
        TRAINER,
        ENDINGS,
        (
            "test_a_step_that_ruins_the_executor_is_taken_back_and_its_checkpoint_set_aside",
            "            self._restore(self._earlier)\n",
            "",
        ),
        (
            "test_a_run_shorter_than_the_limit_that_learned_nothing_does_not_end_well",
            "min(settings.max_idle_iterations, max(2, settings.iterations))",
            "settings.max_idle_iterations",
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
    ),
    *faults(
        "tempact/executor/rollout.py",
        TRAINING,
        (
            "test_videos_that_are_not_numbers_have_no_score_and_harm_no_other",
            "values.nan_to_num(0.0, 0.0, 0.0)",
            "values",
        ),
    ),
    *faults(
        "tempact/executor/sampler.py",
        "tests/executor/test_rollout.py",
        (
            "test_a_videos_noise_is_its_own_whatever_is_drawn_beside_it",
            'derive_seed(seed, plan, "noise", continuation, chunk)',
            'derive_seed(seed, plan, "noise", continuation + shape[1], chunk)',
        ),
    ),
    *faults(
        "tempact/models/wan/transformer.py",
        "tests/executor/test_units.py",
        ("test_a_call_rounds_one_video_as_it_does_several", "FEW_ROWS = 32", "FEW_ROWS = 0"),
    ),
    *faults(
        "tempact/executor/executor.py",
        "tests/executor/test_units.py",
        (
            "test_texts_have_the_rows_of_their_roll_out_whatever_came_before",
            "        self._text_rows = 0\n        with self.precision():\n            self.encode(prompts)",
            "        with self.precision():\n            self.encode(prompts)",
        ),
        (
            "test_an_updates_cache_does_not_grow_with_the_number_of_plans",
            "micro_batches(group, continuations, steps, self.config.micro_batch)",
            "micro_batches(group, continuations, steps, 10**6)",
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
            "test_going_on_from_an_earlier_checkpoint_sets_the_later_course_aside",
            "            records_aside(folder, checkpoint.step)\n",
            "",
        ),
    ),
    Mutation(
        "tempact/distributed/launch.py",
        'if processes and ranks != "1":',
        "if processes and not ranks:",
        ("tests/distributed/test_launch.py::test_wrong_options_are_one_line_before_any_process",),
    ),
    *faults(
        "tempact/errors.py",
        ENDINGS,
        (
            "test_a_signal_that_was_handled_does_not_come_again",
            "        if threading.current_thread() is threading.main_thread():\n",
            "        if not self:\n",
        ),
        (
            "test_a_signal_that_comes_in_a_destructor_is_not_lost",
            "            signal.setitimer(signal.ITIMER_REAL, REMIND_S, REMIND_S)\n",
            "",
        ),
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
    Mutation(
        "tempact/planner/plans.py",
        "zip(pairwise(bounds), drafts, strict=True))",
        "zip(pairwise(bounds), drafts[::-1], strict=True))",
        ("tests/planner/test_plans.py::test_steps_and_spans_stay_together_when_sorted_and_cut",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "        drafts = sorted(drafts, key=lambda draft: draft.start or 0)\n",
        "        ordered = sorted(drafts, key=lambda draft: draft.start or 0)\n"
        "        drafts = [_Draft(o.start, o.end, d.prompt) for o, d in zip(ordered, drafts, strict=True)]\n",
        ("tests/planner/test_plans.py::test_steps_and_spans_stay_together_when_sorted_and_cut",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "return drafts[:most]",
        "return drafts[-most:]",
        ("tests/planner/test_plans.py::test_steps_and_spans_stay_together_when_sorted_and_cut",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "if isinstance(value, int) and not isinstance(value, bool):",
        "if isinstance(value, int):",
        ("tests/planner/test_plans.py::test_bounds_beyond_the_video_and_truth_values_are_no_bounds",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "isinstance(value, int | float) and not isinstance(value, bool) and abs",
        "isinstance(value, int | float) and abs",
        ("tests/planner/test_plans.py::test_bounds_beyond_the_video_and_truth_values_are_no_bounds",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "    return max(-1_000_000, min(1_000_000, value))",
        "    return value",
        ("tests/planner/test_plans.py::test_bounds_beyond_the_video_and_truth_values_are_no_bounds",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "        bounds[i] = max(bounds[i], bounds[i - 1] + chunk)\n",
        "        pass\n",
        ("tests/planner/test_plans.py::test_repairs",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "        bounds[i] = min(bounds[i], bounds[i + 1] - chunk)\n",
        "        pass\n",
        ("tests/planner/test_plans.py::test_repairs",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        '"nearest": lambda chunk: chunk // 2',
        '"nearest": lambda chunk: (chunk - 1) // 2',
        ("tests/planner/test_plans.py::test_bounds_off_the_grid_follow_the_rounding",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        '"up": lambda chunk: chunk - 1',
        '"up": lambda chunk: chunk // 2',
        ("tests/planner/test_plans.py::test_bounds_off_the_grid_follow_the_rounding",),
    ),
    Mutation(
        "tempact/rewards/__init__.py",
        "{name: self._valid(name, _tensor(name, self.quality, [[len(self.own)]]))}",
        "{name: _tensor(name, self.quality, [[len(self.own)]])}",
        ("tests/rewards/test_combine.py::test_a_plan_quality_out_of_range_is_missing",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        "return max(0.0, raw - 0.3 * self.hallucination)",
        "return raw - 0.3 * self.hallucination",
        ("tests/rewards/test_plan_quality.py::test_every_verdict_scores_between_0_and_0_9",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "        token_mask = token_mask & mask[:, None]  #",
        "        #",
        ("tests/rl/test_gspo.py::test_plans_outside_the_mask_are_as_good_as_absent",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "return torch.where(self.mask, values, 0.0).sum() /",
        "return values.sum() /",
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        "    gradient = gradient.masked_fill_(~mask.view(-1, *[1] * (gradient.ndim - 1)), 0.0)\n",
        "",
        ("tests/rl/test_flow_grpo.py::test_rows_outside_the_mask_leave_the_gradient_finite",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        "torch.where(mask, value.double(), 0.0)",
        "value.double()",
        ("tests/rl/test_flow_grpo.py::test_rows_outside_the_mask_leave_the_gradient_finite",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "reference.detach() - log_probs",
        "reference - log_probs",
        ("tests/rl/test_gspo.py::test_the_reference_and_the_old_policy_get_no_gradient",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "log_probs - old.detach()",
        "log_probs - old",
        ("tests/rl/test_gspo.py::test_the_reference_and_the_old_policy_get_no_gradient",),
    ),
    Mutation(
        "tempact/rl/gspo.py",
        '"kl": k3,',
        '"kl": kl_weight * k3,',
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/gspo.py",
        '"ratio_deviation": (ratio - 1).abs(),',
        '"ratio_deviation": ratio - 1,',
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "(ratio < 1 - low) & (advantage < 0)",
        "(ratio < 1 - low)",
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "(ratio > 1 + high) & (advantage > 0)",
        "(ratio > 1 + high) & (advantage < 0)",
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/sequences.py",
        "(ratio < 1 - low) & (advantage < 0)",
        "(ratio < 1 - 10 * low) & (advantage < 0)",
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/gspo.py",
        "k3 = moves.k3.sum(1) / moves.tokens",
        "k3 = moves.k3.sum(1)",
        ("tests/rl/test_gspo.py::test_metrics_are_means_over_the_plans_that_count",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        '"loss": each.loss + kl_weight * each.kl,',
        '"loss": each.loss,',
        ("tests/rl/test_flow_grpo.py::test_gradient_is_policy_plus_weighted_kl_over_the_count",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        '        "kl": each.kl,',
        '        "kl": kl_weight * each.kl,',
        ("tests/rl/test_flow_grpo.py::test_gradient_is_policy_plus_weighted_kl_over_the_count",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        '"ratio_deviation": torch.expm1(each.log_ratio).abs(),',
        '"ratio_deviation": torch.expm1(each.log_ratio),',
        ("tests/rl/test_flow_grpo.py::test_gradient_is_policy_plus_weighted_kl_over_the_count",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        "each.clipped & (advantage < 0)",
        "each.clipped & (advantage > 0)",
        ("tests/rl/test_flow_grpo.py::test_micro_batches_of_any_size_make_the_same_update",),
    ),
    Mutation(
        "tempact/rl/flow_grpo.py",
        "each.clipped & (advantage > 0)",
        "each.clipped",
        ("tests/rl/test_flow_grpo.py::test_micro_batches_of_any_size_make_the_same_update",),
    ),
    Mutation(
        "tempact/rl/advantages.py",
        "centred.abs().amax(1) < 1e-6",
        "centred.abs().amax(1) < 1e-9",
        ("tests/rl/test_advantages.py::test_the_threshold_of_flat_groups_is_between_rounding_and_the_finest_scores",),
    ),
    Mutation(
        "tempact/rl/advantages.py",
        "centred.abs().amax(1) < 1e-6",
        "centred.abs().amax(1) < 1e-5",
        ("tests/rl/test_advantages.py::test_the_threshold_of_flat_groups_is_between_rounding_and_the_finest_scores",),
    ),
    Mutation(
        "tempact/rl/advantages.py",
        "advantage = torch.where(flat[:, None], 0.0, advantage)",
        "advantage = advantage.clone()",
        ("tests/rl/test_advantages.py::test_the_threshold_of_flat_groups_is_between_rounding_and_the_finest_scores",),
    ),
    *faults(
        "tempact/rl/grpo.py",
        "tests/rl/test_planner_losses.py",
        ("test_losses_of_known_numbers", "moves.clipped(moves.moved.exp(),", "moves.clipped(moves.moved.sum(1).exp(),"),
        ("test_metrics_of_tokens_are_means_over_sequences", "moves.by_token(away.abs())", "moves.by_token(away)"),
        ("test_losses_of_known_numbers", "moves.by_token(policy) +", "policy.sum(1) +"),
    ),
    *faults(
        "tempact/rl/rloo.py",
        "tests/rl/test_planner_losses.py",
        (
            "test_losses_of_known_numbers",
            "ratio = moves.moved.sum(1).exp()",
            "ratio = moves.by_token(moves.moved).exp()",
        ),
        ("test_losses_of_known_numbers", "k3 = moves.k3.sum(1)\n", "k3 = moves.by_token(moves.k3)\n"),
        ("test_losses_of_known_numbers", '"kl": k3 / moves.tokens', '"kl": k3'),
    ),
    *faults(
        "tempact/rl/advantages.py",
        "tests/rl/test_advantages.py",
        (
            "test_a_leave_one_out_baseline_is_the_mean_of_the_others",
            "members / (members - 1)",
            "(members - 1) / members",
        ),
        ("test_deviations_of_a_group_of_all_or_none", 'deviation if std == "global" else own', "deviation"),
        ("test_deviations_of_a_group_of_all_or_none", 'if std != "none":', "if std:"),
    ),
    *faults(
        "tempact/rl/diffusion_nft.py",
        "tests/rl/test_diffusion_nft.py",
        (
            "test_gradient_and_loss_are_those_of_the_published_form",
            "(1.0, share), (-1.0, 1.0 - share)",
            "(1.0, share), (-1.0, share)",
        ),
        (
            "test_gradient_and_loss_are_those_of_the_published_form",
            "error + sign * beta * moved",
            "error + beta * moved",
        ),
        ("test_gradient_and_loss_are_those_of_the_published_form", ".clamp(0.0, 1.0)", ".clamp(0.0)"),
        (
            "test_on_policy_the_gradient_is_flow_matching_weighted_by_the_advantage",
            "sign * (weight / size)",
            "weight * (1 / size)",
        ),
        (
            "test_rows_outside_the_mask_count_for_nothing_and_micro_batches_add_up",
            "torch.where(mask.view(wide), gradient / terms, 0.0)",
            "gradient / terms",
        ),
        ("test_a_perfect_prediction_leaves_the_gradient_finite", ".clamp_min(LEAST_ERROR)", ""),
    ),
    *faults(
        "tempact/executor/rollout.py",
        "tests/executor/test_forward_process.py",
        (
            "test_videos_are_those_of_flow_grpo_and_the_record_is_their_clean_chunk_noised_anew",
            "noise(settings.chunks + start // chunk,",
            "noise(start // chunk,",
        ),
    ),
    *faults(
        "tempact/executor/sampler.py",
        "tests/executor/test_forward_process.py",
        (
            "test_every_call_is_trained_and_micro_batches_change_nothing",
            "return self.schedule.calls if self.forward else",
            "return",
        ),
    ),
    *faults(
        "tempact/rl/levels.py",
        "tests/rl/test_levels.py",
        ("test_sliding_takes_the_next_level_every_iteration", "iteration % count", "0 * iteration"),
        ("test_a_drawn_level_follows_its_seed_alone_and_all_are_drawn", "random.Random(seed)", "random.Random(0)"),
    ),
    *faults(
        "tempact/executor/executor.py",
        "tests/executor/test_levels.py",
        (
            "test_the_update_of_all_levels_is_the_mean_of_those_of_each",
            "sigmas[levels.start : levels.stop]",
            "sigmas[: len(levels)]",
        ),
        (
            "test_the_update_of_all_levels_is_the_mean_of_those_of_each",
            "torch.arange(transition.first, transition.first + steps,",
            "torch.arange(0, steps,",
        ),
        (
            "test_the_gap_is_that_of_the_level",
            "chosen = transition.levels[entries.transitions]",
            "chosen = range(len(transition.levels))[entries.transitions]",
        ),
    ),
    *faults(
        "tempact/types.py",
        "tests/executor/test_levels.py",
        ("test_the_update_of_all_levels_is_the_mean_of_those_of_each", "states=states, noises=", "noises="),
    ),
    *faults(
        "tempact/rl/plain_ratio.py",
        "tests/rl/test_plain_ratio.py",
        ("test_gradient_is_that_of_the_densities_ratio", "noise + 0.5 * scale * moved", "noise + scale * moved"),
        ("test_gradient_is_that_of_the_densities_ratio", "pull * (noise + scale * moved)", "pull * noise"),
        ("test_gradient_is_that_of_the_densities_ratio", "torch.where(below | above, 0.0,", "torch.where(below, 0.0,"),
        ("test_scales_are_those_of_the_schedule_and_weights_undo_them", "[1 / own / mean for", "[own / mean for"),
    ),
    *faults(
        "tempact/rl/flow_grpo.py",
        "tests/rl/test_plain_ratio.py",
        (
            "test_on_policy_the_gradient_is_the_normalised_one_times_k_or_alike_for_all_levels",
            "rectifying(self.k) if config.reweight else",
            "rectifying(self.k) if config.ratio_norm else",
        ),
    ),
    *faults(
        "tempact/planner/planner.py",
        "tests/rl/test_training.py",
        ("test_a_planner_moves_towards_the_better_plan", "LOSSES[config.loss](", 'LOSSES["gspo"]('),
    ),
    *faults(
        TRAINER,
        "tests/rl/test_training.py",
        ("test_the_advantages_are_those_of_the_configuration", "std=config.planner.advantage_std", 'std="global"'),
        ("test_the_advantages_are_those_of_the_configuration", "std=config.executor.advantage_std", 'std="global"'),
        (
            "test_the_advantages_are_those_of_the_configuration",
            "leave_one_out=config.planner.loss in LEAVE_ONE_OUT",
            "leave_one_out=False",
        ),
        ("test_policies_take_turns", "self.done // each % 2", "self.done % 2"),
        ("test_policies_take_turns", "filter(self._in_turn, self._trained_policies())", "self._trained_policies()"),
    ),
    *faults(
        "tempact/planner/plans.py",
        "tests/planner/test_plans.py",
        ("test_equal_spans_keep_steps_and_differ_by_a_chunk_at_most", "i * chunks // count", "i"),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "        plan = each if each.worth >= plan.worth else plan\n",
        "",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "            return not any(start in self.known for start in other.starts)",
        "            return True",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "        if not step or wrapper or any(each.starts and each.told for each in (listed if whole else nested)):",
        "        if not step:",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        "    if len(found) < len(pairs):",
        "    if not found and pairs:",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "                if len(found) > 1 and name == next(iter(found)):",
        "                if False:",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "            if self._ends(found.end(), key):",
        "            if True:",
        ("tests/planner/test_plans.py::test_quotes_and_escapes_in_a_text",),
    ),
    Mutation(
        "tempact/planner/answers.py",
        "    repairs |= mistakes\n",
        "",
        ("tests/planner/test_plans.py::test_both_steps_are_read_and_the_repair_is_named",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        '            repairs.setdefault("steps dropped", f"step {place}: found no text to read in {_shown(entry)}")\n',
        "",
        ("tests/planner/test_plans.py::test_repairs",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "        if name in repairs:\n",
        '        if name in repairs and name != "too many steps":\n',
        ("tests/planner/test_requests.py::test_what_a_users_plan_would_lose_is_refused",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        "if len(draft.prompt) > MAX_PROMPT_CHARS and not given:",
        "if len(draft.prompt) > MAX_PROMPT_CHARS:",
        ("tests/planner/test_requests.py::test_long_prompts_of_a_users_plan_are_kept",),
    ),
    Mutation(
        "tempact/planner/plans.py",
        '    if repairs.keys() >= {"keys ignored", "bounds filled"} and (found :=',
        "    if False and (found :=",
        ("tests/planner/test_requests.py::test_what_a_users_plan_would_lose_is_refused",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        '    if "\\0" in text:',
        "    if False:",
        ("tests/test_prompt_file.py::test_what_is_no_prompt_file_is_refused",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        "isinstance(value, str) and not value.strip()) or value != value",
        "isinstance(value, str) and not value.strip())",
        ("tests/planner/test_requests.py::test_seeds_that_a_table_made_fractions",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        "            if not all(blank(cell) for cell in cells[width:]):",
        "            if False:",
        ("tests/test_prompt_file.py::test_what_is_no_prompt_file_is_refused",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        'DELIMITERS = ",;\\t|"',
        'DELIMITERS = ",\\t"',
        ("tests/test_prompt_file.py::test_tables_of_spreadsheets_and_data_frames",),
    ),
    Mutation(
        "tempact/prompt_file.py",
        "    if isinstance(value, float) and value.is_integer():",
        "    if isinstance(value, float):",
        ("tests/test_prompt_file.py::test_what_is_no_prompt_file_is_refused",),
    ),
    Mutation(
        "tempact/models/wan/text.py",
        "rest = places[text_len - 1 :]",
        "rest = places[text_len :]",
        ("tests/models/test_text.py::test_the_words_past_the_rows_are_known",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        '"steps": [step.prompt for step in plan.steps]}',
        '"steps": [step.prompt for step in plan.steps[:1]]}',
        ("tests/rewards/test_plan_quality.py",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        'data, window = {"step": span.step.prompt}, (span.first, span.last)',
        'data, window = {"step": plan.steps[0].prompt}, (span.first, span.last)',
        ("tests/rewards/test_step_following.py",),
    ),
    Mutation(
        "tempact/rewards/__init__.py",
        "step = next((s for s in plan.steps if start is not None and s.start <= start < s.end), None)",
        "step = None if start is None else plan.steps[0]",
        ("tests/rewards/test_step_following.py",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        'data, window = {"instruction": plan.instruction}, (0, frames.shape[2] - 1)',
        'data, window = {"instruction": plan.steps[0].prompt}, (0, frames.shape[2] - 1)',
        ("tests/rewards/test_temporal_following.py",),
    ),
    Mutation(
        "tempact/rewards/__init__.py",
        "{name: self._valid(name, _tensor(name, self.quality, [[len(self.own)]]))}",
        "{name: _tensor(name, self.quality, [[len(self.own)]])}",
        ("tests/rewards/test_combine.py",),
    ),
    Mutation(
        "tempact/rewards/__init__.py",
        "outside = ~torch.isnan(scores) & ~((scores >= 0) & (scores <= 1))",
        "outside = ~torch.isnan(scores) & ~(scores >= 0)",
        ("tests/rewards/test_combine.py",),
    ),
    Mutation(
        "tempact/rewards/__init__.py",
        "outside = ~torch.isnan(scores) & ~((scores >= 0) & (scores <= 1))",
        "outside = ~torch.isnan(scores) & ~(scores <= 1)",
        ("tests/rewards/test_combine.py",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        "Share = Annotated[float, Field(ge=0, le=1)]",
        "Share = float",
        ("tests/rewards/test_plan_quality.py",),
    ),
    Mutation(
        "tempact/rewards/judges/client.py",
        "return Retry(endpoint.fault, charged=False, pause_s=pause)",
        "return Retry(endpoint.fault, pause_s=pause)",
        ("tests/rewards/test_judge_client_rate.py",),
    ),
    Mutation(
        "tempact/rewards/judges/endpoints.py",
        "return math.inf if full else max(self._not_before, self.pace.next)",
        "return math.inf if full else self._not_before",
        ("tests/rewards/test_judge_client_rate.py",),
    ),
    Mutation(
        "tempact/rewards/judges/config.py",
        "            request.headers = type(request.headers)(headers)\n",
        "",
        ("tests/rewards/test_judge_client_hosted.py",),
    ),
    Mutation(
        "tempact/rewards/judges/config.py",
        "follow_redirects=False",
        "follow_redirects=True",
        ("tests/rewards/test_judge_client_hosted.py",),
    ),
    Mutation(
        "tempact/rewards/judged.py",
        "        check=lambda: check_judges((plan, video, step)),\n",
        "",
        ("tests/rewards/test_outage_run.py",),
    ),
    Mutation(
        "tempact/rewards/judges/endpoints.py",
        "        if self._down_since is None:\n            await asyncio.wait([turn]",
        "        if True:\n            await asyncio.wait([turn]",
        ("tests/rewards/test_judge_client_hosted.py",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'f"{prompt.prompt_id} noise") for prompt in missing]',
        'f"{prompt.prompt_id} noise {method.name}") for prompt in missing]',
        ("tests/evaluation/test_harness.py::test_conditions_share_noise_but_not_prompts_and_seeds",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'f"{prompt.prompt_id} noise")',
        'f"{missing[0].prompt_id} noise")',
        ("tests/evaluation/test_harness.py::test_neither_noise_nor_plans_depend_on_the_batch",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'derive_seed(self.suite.seed, seed, f"{prompt.prompt_id} noise")',
        'derive_seed(self.suite.seed, 0, f"{prompt.prompt_id} noise")',
        ("tests/evaluation/test_harness.py::test_conditions_share_noise_but_not_prompts_and_seeds",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'f"{prompts[0].set} plans")',
        'f"{prompts[0].set} plans {who}")',
        ("tests/evaluation/test_harness.py::test_planner_and_start_are_asked_with_the_same_seeds",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'with self.executor.reference() if method.executor == "start" else nullcontext():',
        "with nullcontext():",
        (
            "tests/evaluation/test_harness.py::test_a_condition_is_made_by_the_policies_that_it_names",
            "tests/runs/test_evaluation.py::test_the_baselines_of_a_run_are_those_of_the_untrained_policies",
        ),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'reference=who == "start", ranks=self.ranks).plans',
        "reference=False, ranks=self.ranks).plans",
        (
            "tests/evaluation/test_harness.py::test_a_condition_is_made_by_the_policies_that_it_names",
            "tests/runs/test_evaluation.py::test_the_baselines_of_a_run_are_those_of_the_untrained_policies",
        ),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        "        post = None if self.ranks.first else self.ranks.post\n",
        "        post = None\n",
        ("tests/distributed/test_evaluation_ranks.py::test_results_do_not_depend_on_the_number_of_ranks",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        "            self._receive(step, wait=True)\n",
        "            self._receive(step)\n",
        ("tests/distributed/test_evaluation_ranks.py::test_results_do_not_depend_on_the_number_of_ranks",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        "for unit in ranks.take(units, lambda unit: suite.frames[unit.set] * unit.left):",
        "for unit in units[ranks.rank :: ranks.size]:",
        ("tests/distributed/test_evaluation_ranks.py::test_every_rank_takes_its_part_and_the_longest_come_first",),
    ),
    Mutation(
        "tempact/runs/generation.py",
        "while missing and missing[0] in made:\n                    yield from made.pop(missing.popleft())",
        "while made:\n                    yield from made.pop(next(iter(made)))",
        ("tests/distributed/test_generation_ranks.py::test_files_and_printed_paths_are_those_of_one_process",),
    ),
    Mutation(
        "tempact/runs/generation.py",
        "for other, paths in ranks.posted(wait=video is None):",
        "for other, paths in ranks.posted():",
        ("tests/distributed/test_generation_ranks.py::test_files_and_printed_paths_are_those_of_one_process",),
    ),
    Mutation(
        "tempact/evaluation/__init__.py",
        '    Method(STEP, "start", "start"),',
        '    Method(STEP, "start", "trained"),',
        ("tests/evaluation/test_harness.py::test_what_the_conditions_are",),
    ),
    Mutation(
        "tempact/evaluation/__init__.py",
        '    Method(SINGLE, None, "start"),',
        '    Method(SINGLE, None, "trained"),',
        (
            "tests/evaluation/test_harness.py::test_what_the_conditions_are",
            "tests/runs/test_evaluation.py::test_the_baselines_of_a_run_are_those_of_the_untrained_policies",
        ),
    ),
    Mutation(
        "tempact/shapeworld/world.py",
        'def held_out_prompts(category: str, count: int, seed: int, split: str = "test") -> list[Prompt]:',
        'def held_out_prompts(category: str, count: int, seed: int, split: str = "train") -> list[Prompt]:',
        ("tests/shapeworld/test_grammar.py::test_held_out_instructions_are_of_their_split_and_of_no_other",),
    ),
    Mutation(
        "tempact/shapeworld/world.py",
        "return [_prompt(rng, split, category, i) for i in range(count)]",
        'return [_prompt(rng, "train", category, i) for i in range(count)]',
        ("tests/shapeworld/test_grammar.py::test_held_out_instructions_are_of_their_split_and_of_no_other",),
    ),
    Mutation(
        "tempact/shapeworld/world.py",
        'return [_prompt(rng, "train", "hard" if rng.random() < HARD_SHARE else "simple", i) for i in range(count)]',
        'return [_prompt(rng, "test", "hard" if rng.random() < HARD_SHARE else "simple", i) for i in range(count)]',
        ("tests/shapeworld/test_grammar.py::test_held_out_instructions_are_of_their_split_and_of_no_other",),
    ),
    Mutation(
        "tempact/runs/evaluation.py",
        "name: held_out_prompts(name, count, settings.seed, settings.split)",
        "name: held_out_prompts(name, count, settings.seed)",
        ("tests/runs/test_evaluation.py::test_the_split_decides_the_instructions",),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "rng = np.random.default_rng(self.seed)",
        "rng = np.random.default_rng(0)",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "rng = np.random.default_rng(self.seed)",
        "rng = np.random.default_rng()",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "drawn = rng.integers(0, prompts, (self.resamples, prompts))",
        "drawn = rng.integers(0, max(1, prompts - 1), (self.resamples, prompts))",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "drawn = rng.integers(0, prompts, (self.resamples, prompts))",
        "drawn = rng.integers(0, prompts, (self.resamples, prompts + 1))",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "drawn = rng.integers(0, prompts, (self.resamples, prompts))",
        "drawn = rng.permuted(np.tile(np.arange(prompts), (self.resamples, 1)), axis=1)",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "a[np.isnan(b)], b[np.isnan(a)] = np.nan, np.nan",
        "pass",
        (
            "tests/evaluation/test_statistics.py::test_with_missing_scores_change_and_interval_are_both_those_of_the_pairs",
            "tests/evaluation/test_tables.py::test_the_change_is_that_of_the_videos_that_both_have",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "low, high = np.percentile(means, [2.5, 97.5])",
        "low, high = np.percentile(means, [5.0, 95.0])",
        (
            "tests/evaluation/test_statistics.py::test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods",
        ),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "cells.append((AVERAGE, AVERAGE, [one for one in own if one.judge not in NOT_TEMPORAL]))",
        "cells.append((AVERAGE, AVERAGE, own))",
        ("tests/evaluation/test_statistics.py::test_quality_is_compared_beside_temporal_order_not_in_it",),
    ),
    Mutation(
        "tempact/evaluation/statistics.py",
        "NOT_TEMPORAL = (PICTURE_QUALITY, CLEARNESS, DUPLICATES, PICKSCORE)",
        "NOT_TEMPORAL = (PICTURE_QUALITY, DUPLICATES, PICKSCORE)",
        ("tests/evaluation/test_statistics.py::test_quality_is_compared_beside_temporal_order_not_in_it",),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'return row if row is not None and file_hash(self.folder / row["file"]) == row["sha256"] else None',
        'return row if row is not None and (self.folder / row["file"]).is_file() else None',
        (
            "tests/evaluation/test_harness.py::test_a_video_that_is_not_as_it_was_made_is_made_again",
            "tests/runs/test_evaluation.py::test_a_cut_cell_is_made_again_and_the_table_stays_the_same",
        ),
    ),
    Mutation(
        "tempact/evaluation/harness.py",
        'if known is None or known["sha256"] != made["sha256"]:',
        "if known is None:",
        ("tests/evaluation/test_harness.py::test_a_score_counts_for_the_file_that_was_scored",),
    ),
    Mutation(
        "tempact/runs/evaluation.py",
        "folder = ranks.from_first(lambda: table_folder(config, run, selection))",
        "folder = run",
        ("tests/runs/test_evaluation.py::test_an_evaluation_with_another_seed_leaves_the_runs_own_alone",),
    ),
    Mutation(
        "tempact/runs/run.py",
        "if checkpoint.current:",
        "if checkpoint.path.is_dir():",
        ("tests/runs/test_evaluation.py::test_scores_are_filed_under_the_checkpoint_that_made_the_videos",),
    ),
    Mutation(
        "tempact/evaluation/tables.py",
        "if unwritable or name in told or prompt.text in ids:",
        "if unwritable:",
        ("tests/evaluation/test_harness.py::test_vbench_gets_every_video_where_two_prompts_want_one_name",),
    ),
    *faults(
        "tempact/executor/lora.py",
        "tests/executor/test_lora.py",
        (
            "test_a_changed_adapter_is_merged_anew_into_the_same_memory",
            "if self._merged.state != state:",
            "if not self._merged.state:",
        ),
        ("test_gradients_and_other_adapters_are_never_merged", " or torch.is_grad_enabled()", ""),
        (
            "test_gradients_and_other_adapters_are_never_merged",
            "if self._merged.state[:1] == tuple(self.active_adapters) else None",
            "if self._merged.state else None",
        ),
        ("test_merging_ends_with_its_context", "            layer.merging = merging\n", "            pass\n"),
    ),
    *faults(
        "tempact/executor/cuda_graphs.py",
        "tests/executor/test_cuda_graphs.py",
        (
            "test_graphs_give_way_to_shapes_in_use",
            "        if used[oldest] > graph.calls[0]:\n            return False\n",
            "",
        ),
    ),
    *faults(
        "tempact/executor/cuda_graphs.py",
        "tests/executor/test_graph_replays.py",
        (
            "test_the_adapter_is_part_of_the_key",
            "torch.is_grad_enabled(), adapter, alone,",
            "torch.is_grad_enabled(), alone,",
        ),
        ("test_autocast_is_part_of_the_key", "runtime.get_backend(), cast", "runtime.get_backend()"),
        ("test_autocast_keeps_no_weights_of_a_recording", "cache_enabled=False", "cache_enabled=True"),
        (
            "test_gradients_add_to_what_the_optimiser_left",
            "            torch._foreach_zero_(missing)",
            "            pass",
        ),
        (
            "test_gradients_add_to_what_the_optimiser_left",
            "                own.copy_(parameter.grad)",
            "                pass",
        ),
        (
            "test_inputs_are_those_of_the_call",
            "if source() is not new or version != new._version:",
            "if source() is not new:",
        ),
        (
            "test_inputs_are_those_of_the_call",
            "if source() is not new or version != new._version:",
            "if version != new._version:",
        ),
        ("test_graphs_are_forgotten_where_the_pools_move", "                self.forget()\n", "                pass\n"),
        ("test_activations_wait_for_their_backward", "        if self._waiting() is not None:", "        if False:"),
        ("test_a_second_backward_of_one_call_is_refused", "        if ctx.activations is None:", "        if False:"),
        (
            "test_graphs_are_replayed_again_once_activations_are_used_or_dropped",
            "        ctx.activations = None\n",
            "",
        ),
        (
            "test_a_recording_that_fails_leaves_plain_calls",
            "            graph.forward = graph.backward = graph.output = graph.output_grad = None\n",
            "",
        ),
        ("test_a_recording_that_fails_leaves_plain_calls", "if graph.refused or len", "if len"),
    ),
    *faults(
        "csrc_triton/integrations/_frames.py",
        "tests/integrations/test_wan_causal.py",
        (
            "test_a_roll_out_is_that_of_the_models_own_attention",
            "return [(0, self.sink), (first - recent, first)]",
            "return [(first - recent - self.sink, first)]",
        ),
        (
            "test_a_new_text_rewrites_the_window_but_for_its_sink",
            "0 if last <= self.frames else last - self.frames + self.sink",
            "0 if last <= self.frames else last - self.frames",
        ),
        ("test_a_relative_window_without_a_sink_turns_nothing", "self.relative and self.sink and", "self.relative and"),
        (
            "test_what_does_not_fit_is_named",
            "            if rows is not None and not call.called:",
            "            if False:",
        ),
    ),
    *faults(
        "csrc_triton/integrations/_frames.py",
        "tests/integrations/test_diffusers_windows.py",
        ("test_windows_see_the_listed_frames_at_the_listed_positions", "rotate(k, *rope), v)", "k, v)"),
        (
            "test_windows_see_the_listed_frames_at_the_listed_positions",
            "            for copy in copies.values():\n                self.cache.release(copy)",
            "            pass",
        ),
        ("test_gradient_checkpointing_outside_of_the_block_is_refused", "        if self.closed:", "        if False:"),
        (
            "test_rope_tables_are_made_of_the_chunk_alone",
            "torch.arange(frames.start, frames.stop, device",
            "torch.arange(0, frames.stop, device",
        ),
    ),
    *faults(
        "csrc_triton/integrations/_frames.py",
        "tests/integrations/test_diffusers_compiled.py",
        (
            "test_layers_and_chunks_share_four_graphs[blocks]",
            "            self._for_compiled_layers(views)",
            "            pass",
        ),
    ),
    *faults(
        "tempact/executor/executor.py",
        "tests/executor/test_cuda_graphs.py",
        ("test_a_cache_for_graphs_stays_where_it_is", "if plans and self.runner.graphs:", "if plans > 99:"),
        (
            "test_videos_are_made_with_merged_weights_and_training_is_not",
            "        with self.merged(), self.precision(), self.history(*noise",
            "        with self.precision(), self.history(*noise",
        ),
    ),
    *faults(
        "tempact/planner/planner.py",
        EQUAL,
        (f"{BITS}[six plans-2]", 'derive_seed(seed, b, "plan", m)', 'derive_seed(seed, b, "plan", m, ranks.rank)'),
    ),
    *faults(
        "tempact/updates.py",
        EQUAL,
        (
            f"{BITS}[six plans-2]",
            "sum(map(len, units)))",
            "sum(map(len, _dealt(units, self.policy.ranks.rank, self.policy.ranks.size))))",
        ),
        (
            f"{BITS}[six plans-2]",
            "self.terms = [executor.terms(part, mask, len(levels)) for part in parts]",
            "self.terms = [executor.terms([*chain(*_dealt(own, ranks.rank, ranks.size))], mask, len(levels))"
            " for own in self.units]",
        ),
    ),
    *faults(
        TRAINER,
        EQUAL,
        (f"{BITS}[six plans-2]", 'self._seed("noise")', 'self._seed("noise", self.ranks.rank)'),
    ),
    *faults(
        "tempact/distributed/reduction.py",
        EQUAL,
        (f"{BITS}[six plans-2]", "flat.copy_(whole)", "flat.copy_(whole / ranks.size)"),
        (f"{BITS}[six plans-2]", "while stack and stack[-1][0] == level and index % 2:", "while stack:"),
    ),
    *faults(
        "tempact/distributed/reduction.py",
        "tests/distributed/test_ranks.py",
        ("test_the_sum_is_that_of_one_tree", "flat.copy_(whole)", "flat.copy_(whole / ranks.size)"),
        ("test_the_sum_is_that_of_one_tree", "while stack and stack[-1][0] == level and index % 2:", "while stack:"),
        ("test_a_checksum_sees_other_bits_and_other_places", "sums.append(number * ", "sums.append("),
        ("test_metrics_are_summed_alike_on_all", "partial(torch.as_tensor, dtype=torch.float64)", "torch.as_tensor"),
    ),
    *faults(
        "tempact/distributed/__init__.py",
        "tests/distributed/test_ranks.py",
        (
            "test_an_error_of_one_rank_is_raised_by_all_and_says_where",
            "self.agreed(lambda: None if self.local_rank else early.append(act()), UserError)",
            "self.gather(None if self.local_rank else early.append(act()))",
        ),
    ),
    *faults(
        "tempact/distributed/reduction.py",
        GROUPS,
        ("test_leaves_fall_to_one_rank_each_and_their_sum_has_one_order", "rank % members * units\n", "0\n"),
    ),
    *faults(
        "tempact/distributed/__init__.py",
        GROUPS,
        ("test_ranks_of_groups", "range(self.member, self.size, self.members)", "range(self.size)"),
    ),
    *faults(
        "tempact/executor/sampler.py",
        GROUPS,
        (
            "test_a_block_follows_the_first_continuations_noise_until_its_fork",
            "own.start + continuation if chunk >= forks[plan] else 0",
            "own.start + continuation",
        ),
    ),
    *faults(
        "tempact/rewards/__init__.py",
        GROUPS,
        ("test_scores_of_blocks_are_put_together_by_their_place", "rows[:, videos.start : videos.stop]", "rows[:, :2]"),
        (
            "test_a_plans_one_score_is_not_that_of_a_part_of_its_videos",
            'level == "plan" and self.continuations is None',
            'level == "plan"',
        ),
    ),
    *faults(
        "tempact/forks.py",
        "tests/test_forks.py",
        (
            "test_a_groups_switch_is_the_same_whatever_the_groups_beside_it",
            "        longest = max(len(plan.steps) for plan in group)\n",
            "        longest, rng = max(len(plan.steps) for plan in group), rngs[0]\n",
        ),
        (
            "test_a_tree_forks_at_starts_of_steps_of_the_same_ordinals_and_always_has_all_continuations",
            "(*branching[:last], math.prod(branching[last:]))",
            "branching[: last + 1]",
        ),
        (
            "test_a_tree_forks_at_starts_of_steps_of_the_same_ordinals_and_always_has_all_continuations",
            "steps = sorted({min(ordinal, len(plan.steps) - 1) for ordinal in drawn} - {0})",
            "steps = sorted({ordinal % len(plan.steps) for ordinal in drawn} - {0})",
        ),
        (
            "test_a_random_chunk_is_any_but_the_first_alike_for_a_group_and_uniform",
            "for number in [rng.randrange(1, group[0].frames // chunk)] * len(group)",
            "for number in [rng.randrange(1, group[0].frames // chunk) for _ in group]",
        ),
    ),
    *faults(
        "tempact/types.py",
        "tests/executor/test_trees.py",
        (
            "test_training_sees_the_context_of_the_roll_out_and_micro_batches_change_nothing",
            "first // number * number * each, leaves",
            "0, leaves",
        ),
        (
            "test_a_leafs_video_is_that_of_the_noise_on_its_way",
            "return self.branches(sum(fork <= frame for fork in self.frames))",
            "return self.branches(sum(fork < frame for fork in self.frames))",
        ),
        (
            "test_parts_of_a_roll_out_record_the_same",
            "plan=self.siblings[i].plan - whole.start)",
            "plan=self.siblings[i].plan)",
        ),
    ),
    *faults(
        "tempact/executor/rollout.py",
        "tests/executor/test_trees.py",
        (
            "test_a_leafs_video_is_that_of_the_noise_on_its_way",
            "own[i * each : (i + 1) * each], new)",
            "own[i::number], new)",
        ),
        (
            "test_the_record_holds_every_branch_at_its_fork_on_the_context_that_it_comes_from",
            "own = latents[row.plan, row.context, :, : len(frames)]",
            "own = latents[row.plan, 0, :, : len(frames)]",
        ),
    ),
    *faults(
        "tempact/executor/executor.py",
        "tests/executor/test_trees.py",
        (
            "test_training_sees_the_context_of_the_roll_out_and_micro_batches_change_nothing",
            "history.context([history.branches[contexts.index(own)] for own in shared], start)",
            "history.context([history.branches[i % len(contexts)] for i in range(len(shared))], start)",
        ),
        (
            "test_rows_of_one_context_share_it_and_the_cache_does_not_grow_with_the_plans",
            "contexts = [*dict.fromkeys(shared)]",
            "contexts, shared = [*range(len(plans))], [*range(len(plans))]",
        ),
    ),
    *faults(
        "tempact/executor/sampler.py",
        "tests/executor/test_trees.py",
        (
            "test_a_seed_group_begins_its_chunks_from_one_noise_and_draws_the_rest_apart",
            "own[0] = self.draw(plan, 0, chunk)[0]",
            "own[:] = self.draw(plan, 0, chunk)",
        ),
        (
            "test_a_seed_group_begins_its_chunks_from_one_noise_and_draws_the_rest_apart",
            "if continuation and chunk < chunks:",
            "if continuation:",
        ),
    ),
    *faults(
        "tempact/rl/advantages.py",
        "tests/rl/test_advantages.py",
        (
            "test_a_branchs_advantage_is_the_mean_of_its_leaves_against_its_siblings_of_one_depth",
            "leaves.stop].nanmean()",
            "leaves.stop].amax()",
        ),
        (
            "test_a_branchs_advantage_is_the_mean_of_its_leaves_against_its_siblings_of_one_depth",
            "else row.shared",
            "else (row.plan, row.depth, 0)",
        ),
        (
            "test_missing_leaves_are_left_out_of_a_branch_and_a_branch_of_none_out_of_its_siblings",
            "leaves.stop].nanmean()",
            "leaves.stop].mean()",
        ),
        ("test_each_depth_is_normalised_by_itself", "if row.depth == depth:", "if row.depth <= depth:"),
        (
            "test_a_branchs_advantage_is_the_mean_of_its_leaves_against_its_siblings_of_one_depth",
            "if len(branches) < table.numel():",
            "if not branches:",
        ),
    ),
    *faults(
        "tempact/rewards/__init__.py",
        "tests/rewards/test_custom.py",
        (
            "test_every_fork_of_a_tree_is_judged_by_its_own_step",
            "spans = switch_spans(part, rollout, depth, within",
            "spans = switch_spans(part, rollout, within",
        ),
        (
            "test_every_fork_of_a_tree_is_judged_by_its_own_step",
            "self.broken.append(broken.cpu() | without)",
            "self.broken.append(broken.cpu())",
        ),
        (
            "test_every_fork_of_a_tree_is_judged_by_its_own_step",
            "(STEP_REWARDS if depth else VIDEO_REWARDS)",
            "VIDEO_REWARDS",
        ),
        ("test_a_fork_within_a_step_is_judged_by_that_step", "if start > step.start else 0", "if not start else 0"),
    ),
    *faults(
        "tempact/shapeworld/world.py",
        "tests/shapeworld/test_rewards.py",
        (
            "test_a_fork_within_a_step_is_judged_by_the_whole_step_and_the_pictures_behind_the_fork",
            "max(span.first, span.fork)",
            "span.first",
        ),
        (
            "test_a_fork_within_a_step_is_judged_by_the_whole_step_and_the_pictures_behind_the_fork",
            "start = max(1, span.step.start)",
            "start = span.step.start",
        ),
        (
            "test_aesthetics_have_the_same_bits_whatever_the_number_of_videos",
            "(0, -len(mean) % VECTORS)",
            "(0, 0)",
        ),
    ),
    *faults(
        "tempact/updates.py",
        EQUAL,
        (
            f"{BITS}[a tree-2]",
            "range(rows_of[own[0]].start, rows_of[own[-1]].stop): record",
            "range(own.start, own.stop): record",
        ),
    ),
    *faults(
        "tempact/forks.py",
        "tests/test_forks.py",
        ("test_all_trained_chunks_follow_the_same_switch", '[0] * (config.forks == "none")', "[]"),
        ("test_all_trained_chunks_follow_the_same_switch", "plan.steps[plan.step_at(frame)].end", "plan.steps[-1].end"),
    ),
    *faults(
        "tempact/types.py",
        "tests/executor/test_trees.py",
        (
            "test_videos_that_go_on_alone_are_recorded_and_trained_on_contexts_of_their_own",
            "first // number * number * each",
            "0",
        ),
        (
            "test_videos_that_go_on_alone_are_recorded_and_trained_on_contexts_of_their_own",
            "for row in reversed(record.siblings) if",
            "for row in record.siblings if",
        ),
    ),
    *faults(
        "tempact/rl/advantages.py",
        "tests/rl/test_advantages.py",
        (
            "test_by_depth_a_branch_is_compared_with_all_of_its_depth",
            "(row.plan,) if by_depth else row.shared",
            "row.shared",
        ),
        (
            "test_all_chunks_of_a_video_have_the_advantage_of_the_first",
            "group.setdefault(leaves.start, []).append((number, column))",
            "group.setdefault(100 * number + column, []).append((number, column))",
        ),
    ),
    *faults(
        "tempact/shapeworld/strict.py",
        "tests/shapeworld/test_strict.py",
        (
            "test_sets_are_fixed_of_their_split_and_tell_nothing_twice",
            "if event_sequence(story) not in told), None)",
            "if True), None)",
        ),
        ("test_a_reworded_plan_tells_the_same_in_other_words", "rng, HELD_OUT))", "rng))"),
        (
            "test_the_matcher_is_told_known_words_of_the_same_story",
            "write_instruction(actors_only(story), random.Random(instruction))",
            "instruction",
        ),
    ),
    *faults(
        "tempact/shapeworld/wording.py",
        "tests/shapeworld/test_strict.py",
        (
            "test_the_held_out_wording_is_written_and_read_back",
            '"|".join(sorted(every, key=len, reverse=True))',
            '"|".join(every)',
        ),
        (
            "test_no_text_of_training_or_validation_has_a_held_out_phrase_but_all_its_words_are_known",
            '"turn": ("turns to {}",),',
            '"turn": ("turns {}",),',
        ),
    ),
    *faults(
        "tempact/shapeworld/crowd.py",
        "tests/shapeworld/test_crowd.py",
        (
            "test_without_its_bystander_a_video_loses_at_least_half",
            "return score * (1.0 - MISSED * (1.0 - standing))",
            "return score",
        ),
        (
            "test_taking_the_bystander_out_leaves_the_others_as_they_are",
            "own = torch.where(covering < 0.0, pb / bb, own)",
            "own = (pb / bb)",
        ),
        ("test_what_cannot_be_told_apart_is_refused", "or turns or stops or alike:", "or turns or alike:"),
    ),
    *faults(
        "tempact/shapeworld/grammar.py",
        "tests/shapeworld/test_crowd.py",
        ("test_only_a_story_of_three_has_steps_with_three", "len(entities) > len(ROWS))", "True)"),
    ),
    *faults(
        "tempact/evaluation/statistics.py",
        "tests/evaluation/test_statistics.py",
        ("test_without_a_gain_there_is_nothing_to_confirm", "if interval(drawn[1])[0] > 0:", "if True:"),
        (
            "test_only_videos_that_both_judges_have_scored_of_both_methods_count",
            "return np.where(np.isnan(gains).any(0), NAN, gains)",
            "return gains",
        ),
        (
            "test_the_share_that_the_held_out_judge_confirms_is_that_of_the_gains",
            "share = float(held_out / rewarded)",
            "share = float(rewarded / held_out)",
        ),
        (
            "test_rows_of_overfitting_are_against_their_own_untrained_ones",
            "against = BASELINES.get(method, baseline)",
            "against = baseline",
        ),
    ),
    *faults(
        "tempact/evaluation/harness.py",
        "tests/evaluation/test_harness.py",
        (
            "test_reworded_plans_are_told_in_other_words_and_share_plan_and_noise",
            "if method.reworded else plans",
            "if method.reworded and method.trained else plans",
        ),
    ),
    *faults(
        "tempact/runs/evaluation.py",
        "tests/runs/test_evaluation.py",
        (
            "test_what_runs_are_compared_by_has_a_hash",
            'digest({**suite.tests, "code": shapeworld_code()})',
            "digest(suite.tests)",
        ),
        (
            "test_the_stricter_suite_has_a_table_of_its_own_with_the_rows_of_overfitting",
            "(*METHODS, *OVERFITTING) if is_strict(config) else METHODS",
            "METHODS",
        ),
    ),
    *faults(
        "tempact/reporting/alarms.py",
        "tests/runs/test_alarms.py",
        (
            "test_an_alarm_exceeds_its_limit_and_the_error_of_its_change",
            " and self.worse > self.deviations * self.error",
            "",
        ),
        (
            "test_an_alarm_exceeds_its_limit_and_the_error_of_its_change",
            "first, latest = looks[: settings.window], looks[-settings.window :]",
            "first, latest = looks[:1] * settings.window, looks[-settings.window :]",
        ),
    ),
    *faults(
        "tempact/runs/watching.py",
        "tests/runs/test_alarms.py",
        (
            "test_a_resumed_run_knows_what_it_has_seen_and_tells_no_alarm_twice",
            "if change.alarm and change.name not in before:",
            "if change.alarm:",
        ),
        ("test_processes_see_together_what_one_would_see", "places = sorted(videos)", "places = list(videos)[:4]"),
    ),
    *faults(
        "tempact/rl/sequences.py",
        "tests/rl/test_histograms.py",
        (
            "test_sequences_are_counted_in_clips_of_their_side",
            "torch.where(away > 0, high, low)",
            "torch.where(away > 0, low, high)",
        ),
    ),
    *faults(
        "tempact/runs/trackers.py",
        "tests/runs/test_trackers.py",
        (
            "test_a_tracker_is_given_the_configuration_every_row_and_the_videos",
            'if row["step"] > step:',
            'if row["step"]:',
        ),
        (
            "test_trackers_that_hang_or_fail_are_one_warning_each_and_hold_up_nothing",
            "except (Exception, SystemExit) as error:",
            "except ValueError as error:",
        ),
    ),
    *faults(
        "tempact/executor/best_of.py",
        BEST_OF,
        ("test_the_chosen_continuation_goes_on", "latents[chosen : chosen + 1].clone()", "latents[:1].clone()"),
        ("test_the_cache_holds_one_context_for_all", "        history.release(forks)\n", ""),
        ("test_the_cache_holds_one_context_for_all", "if at + history.chunk < end:", "if at < end:"),
        (
            "test_where_there_are_continuations",
            "min(step.end, start + self.chunks * chunk)",
            "start + self.chunks * chunk",
        ),
        ("test_choices_are_made_outside_of_autocast", "enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),
    ),
    *faults(
        "tempact/executor/executor.py",
        BEST_OF,
        ("test_a_cache_for_graphs_stays_where_it_is", "rows + more * self.frame_tokens", "rows"),
    ),
    *faults(
        "tempact/executor/sampler.py",
        BEST_OF,
        ("test_the_chosen_continuation_goes_on", "chosen.get(chunk, 0)", "0"),
    ),
    *faults(
        "tempact/rewards/choice.py",
        "tests/rewards/test_choice.py",
        ("test_missing_scores_never_win", "        total = total.masked_fill(broken.cpu(), math.nan)\n", ""),
        ("test_missing_scores_never_win", " if not scores[name].isnan().all()]", "]"),
        ("test_the_weighted_sum_of_trainings_rewards_chooses", "weight * scores[name] for", "scores[name] for"),
    ),
    *faults(
        "tempact/runs/best_of.py",
        "tests/test_generate.py",
        (
            "test_a_step_in_the_making_ends_where_its_frames_end",
            "Step(before, before + made.end - made.start,",
            "Step(before, before + 1,",
        ),
    ),
    *faults(
        "csrc_triton/fp8_linear/fused.py",
        "tests/ops/test_fp8_linear.py",
        ("test_the_kernel_has_torchs_bits", "tl.store(scales + row, ", "tl.store(scales + row * 0, "),
        ("test_gelu_comes_before_the_rounding", "    if GELU:\n", "    if GELU and ROWS == 1:\n"),
        ("test_the_kernel_has_torchs_bits", "tl.max(tl.abs(value), axis=1)", "tl.max(value, axis=1)"),
    ),
    *faults(
        "csrc_triton/fp8_linear/naive.py",
        "tests/ops/test_fp8_linear.py",
        ("test_scales_are_those_of_their_own_rows", "weight.float() * weight_scales", "weight.float()"),
        ("test_the_kernel_has_torchs_bits", "(limit / largest)", "(LARGEST / largest)"),
        (
            "test_autocast_does_not_round_the_sums",
            "enabled=False",
            "enabled=torch.is_autocast_enabled(values.device.type)",
        ),
    ),
    *faults(
        "csrc_triton/fp8_linear/__init__.py",
        "tests/ops/test_fp8_linear.py",
        (
            "test_the_product_is_chosen_by_device_dtype_and_shape",
            "width % MULTIPLE or channels % MULTIPLE",
            "width % MULTIPLE",
        ),
    ),
    *faults(
        "tempact/executor/fp8.py",
        "tests/executor/test_fp8.py",
        (
            "test_velocities_are_close_to_those_of_the_adapted_weights",
            "weight = weight + linear.get_delta_weight(name)",
            "pass",
        ),
    ),
    *faults(
        "tempact/models/wan/fp8.py",
        "tests/executor/test_fp8.py",
        ("test_a_call_is_the_product_of_what_was_rounded", "fp8_rows(up(x), gelu=True)", "fp8_rows(up(x))"),
    ),
    *faults(
        "tempact/models/wan/transformer.py",
        "tests/executor/test_fp8.py",
        ("test_query_key_and_value_share_a_rounding", "        rows = self.rows(x)\n", "        rows = x\n"),
    ),
    *faults(
        "tempact/policies.py",
        "tests/executor/test_fp8.py",
        ("test_training_and_evaluation_refuse_rounded_linears", "    check_exact(config)\n", ""),
    ),
    *faults(
        "tempact/train.py",
        "tests/executor/test_fp8.py",
        ("test_training_and_evaluation_refuse_rounded_linears", "    check_exact(config)\n", ""),
    ),
]
