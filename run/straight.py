"""Whether a run is straight: made as an uninterrupted run of its config is made.

    state.stretches += new_stretch(saved, changed, config, machine)    # on resume
    is_straight(config, vars(state))

A stretch begins where a run resumed with something changed: {"step": updates made so far, "changed": {key: [before,
after]}}. The keys are those of the schedule, and "machine", as records.machine_of names it. An interruption alone
begins no stretch. Where a run was extended its learning rate jumps, so its record enters no mean.
"""

import dataclasses

from run.records import evaluation_steps, machine_of
from run.update import learning_rate

ANNEALED = ("router_temperature_schedule", "expert_dropout_schedule", "aux_loss_coef_schedule")


def new_stretch(saved, changed, config, machine) -> list[dict]:
    """The stretch that begins when a run resumes, alone in a list; an empty list where nothing changed.

    saved: the checkpoint; changed: from run_folder.check_resumable; machine: as a record describes it.
    """
    before, changes = saved["progress"], {key: [theirs, ours] for key, ours, theirs in changed}
    if before.get("machine"):  # older checkpoints do not name theirs
        there = machine_of({"machine": before["machine"], "config": saved["config"]})
        here = machine_of({"machine": machine, "config": config.to_dict()})
        changes |= {"machine": [there, here]} if there != here else {}
    return [{"step": before["step"], "changed": changes}] if changes else []


def is_straight(config, progress) -> bool:
    """Whether all updates and evaluations so far are those of an uninterrupted run of this config.

    progress: of a checkpoint, with step, evaluations, and start and stretches (missing in older ones).
    """
    if progress.get("start"):  # with the weights of another run
        return False
    end, evaluated = progress["step"], [line["step"] for line in progress["evaluations"]]
    due = [step for step in evaluation_steps(config) if step <= end]
    if evaluated not in (due, [step for step in due if step < end]):  # the one at this step may be still to come
        return False
    then, machine, last_machine = config, None, None
    for stretch in reversed(progress.get("stretches", [])):  # backwards, for the config after the last one is known
        if not same_updates(then, config, stretch["step"], end) or (machine != last_machine and stretch["step"] < end):
            return False
        before = {key: was for key, (was, _) in stretch["changed"].items()}
        if "machine" in before:
            machine, last_machine = before.pop("machine"), last_machine or stretch["changed"]["machine"][1]
        then, end = dataclasses.replace(then, **before), stretch["step"]
    return same_updates(then, config, 0, end) and (machine == last_machine or end == 0)


def same_updates(one, other, start, end) -> bool:
    """Whether two configs that differ in their schedule make updates start … end - 1 and their evaluations alike."""
    if start == end:
        return True
    if one.eval_iters != other.eval_iters or one.differences(other, ("experiment",)):
        return False
    if one.max_iters != other.max_iters and any(getattr(one, key) != "constant" for key in ANNEALED):
        return False
    return all(learning_rate(step, one) == learning_rate(step, other) for step in range(start, end))
