"""`python -m jaxreason`: list the entry points, one per line."""

ENTRY_POINTS = """\
python -m jaxreason.main --config=configs/tiny.py            train: pretrain, imitate, reinforce, on one loop
python -m jaxreason.main --config=FILE --describe            all fields of a config: types, defaults, what each does
python -m jaxreason.main --list                              tasks, verifiers, objectives, sources, models, optimizers ...
python -m jaxreason.sweep --config=FILE --grid="FIELD=A,B"   the same config with other fields, paired seeds, a report
python -m jaxreason.evaluate --checkpoint=RUN                suites of held-out tasks, several samples each; --compare A B
python -m jaxreason.generate --checkpoint=RUN --out=FOLDER   a data set of its right attempts, to train another model on
python -m jaxreason.export RUN OUT                           a Hugging Face folder from a run
python -m jaxreason.plan --config=FILE --topology=v5e:4x8    will it fit, and how fast can it be, without the devices
python -m jaxreason.bench NAME                               measure: sampler, learner, step, lookup, cache

Each takes --help. Configs are in configs/; options follow a colon (configs/tiny.py:task=countdown,smoke), and
--config.rl.optimizer.lr=1e-4 sets a field."""

if __name__ == "__main__":
    print(ENTRY_POINTS)
