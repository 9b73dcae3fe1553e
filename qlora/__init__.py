"""Owns the learning core: data, prompts, packing, attention, adapters, training and the metric.

It knows neither Ray nor MLflow. Many trials train LoRA adapters on one frozen base in one process; their
tokens share passes over packed sequences. Data flows like this:

    rows of a file
         |  data.examples
         v
      Example          id, instruction, output
         |  data.prompts
         v
    EncodedExample     token ids of prompt and answer
         |  packed.packing: split_by_budget, next_pass
         v
       Group           examples behind the prefix that their prompts share
         |  packed.packing: lay_out
         v
    Part / Layout      | prefix | suffix 0 | suffix 1 | .. || prefix | suffix 0 | ..    a part for each group
         |  packed.packing: on_device
         v
    PackedBatch        the layout's tensors on the device
         |  passes: each part goes through its own trial's adapter
         v
       Pass            base and adapters over the whole stream; logits at scored positions only
         |  answer_nll
         v
       NLL             of each answer token: a loss to train on, or a perplexity to report

Read it in this order, and learn

    config                   all settings with their defaults, and the one error that users see
    files                    how a file is replaced so that nobody reads half of it
    provenance               what a result must say so that it can be reproduced

    data/json_rows           reading a JSON list of any length in little memory
    data/examples            what an example is, and how one is checked
    data/prompts             from a template and shots to token ids

    packed/stream            what a packed sequence is, and who attends to whom in it
    packed/packing           how examples become groups of a bounded size, and groups a stream
    packed/attention         how to give a transformers model another attention
    packed/handed_down       a batch for families that hand no keywords down
    packed/agreement         trying a loaded model against its own attention
    packed/flash_attention   joining two softmaxes by their log-sum-exps

    base/reference           what the name of a base stands for
    base/device              dtype and free memory of a device
    base/loading             transformers' loading, quiet and failing in one line
    base/weights             weights that are missing, left over or no numbers
    base/rotary              positions that do not depend on what an example is next to
    base/model               a frozen model in NF4 (QLoRA)
    base/fused               one kernel in place of several

    lora/products            LoRA's forward and backward, written out
    lora/tables              how kernels find adapters by address
    lora/programs            what a Triton kernel does with a tile of many adapters' tokens
    lora/kernels             the same products for many adapters at once, in Triton
    lora/adapter             one adapter's weights as one vector
    lora/banked_linear       a linear layer that routes tokens through adapters
    lora/bank                many adapters on one base
    lora/peft_folder         an adapter on disk, in PEFT's layout

    answer_nll               the loss: negative log-likelihood of answer tokens
    passes                   one pass over the groups of several trials
    pass_buffers             padding a pass to a rounded size, so that it can be replayed
    recorded_passes          CUDA graphs of passes
    training                 optimizer steps of several trials in shared passes, and resuming them exactly
    perplexity               the metric
    checkpoint               what a trial writes so that it can go on after a kill
    served                   base and adapter merged into one model for inference

Glossary

    Example          one row of a data file: id, instruction and, if it is known, output
    EncodedExample   an example's token ids: prompt and answer
    Group            examples of one trial that go through a model together, behind their shared prefix
    Part             a group's place in a stream: its prefix, then the suffixes, which are the rows behind it
    Layout           a stream on the host, as NumPy arrays: token ids, positions, scored positions, parts
    PackedBatch      a layout's tensors on a device: what a model is called with
    Stretches        bounds of rows, parts and prefixes in a stream, as FlashAttention takes them
    Pass             one forward, and in training one backward, over a layout with an adapter for each part
    Recording        a CUDA graph of a pass of a rounded size, which is replayed with new contents
    Adapter          one trial's LoRA weights and their gradients
    AdapterBank      one frozen base and all adapters on it
    Route            which tokens of a pass go through which adapter
    Training         one adapter in training: its data order, optimizer, schedule and step
    Timetable        where steps stand in a trial's epochs and stages
    stage            a stretch of epochs with a fresh optimizer and schedule ("1+1+3" has three stages)
"""
