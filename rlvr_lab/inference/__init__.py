"""Methods that act at test time, for any causal language model of transformers with its tokenizer.

Each is a class over a pair (model, tokenizer), used in three lines:

    from rlvr_lab.inference.diffadapt import DiffAdapt
    adapt = DiffAdapt.fit(model, tokenizer, known, verify, generator=generator)
    print(adapt.run(problems, verify=verify, generator=generator))

- `problems` are texts or (text, answer) pairs; `verify(response, answer)` says whether a response is right.
- `run` gives an `inference.report.Report`: tokens saved and accuracy beside the same model without the method, each
  with an interval paired over problems.
- What they share is `inference.lm`: `as_policy(model, tokenizer)` makes the pair a `Policy`, which every engine of
  `rollout` takes; `respond(policy, prompts, ...)` samples with limits and temperatures of its own for each prompt.
"""
