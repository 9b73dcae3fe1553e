"""Owns batch inference: from a file of instructions to a file of generated texts, on Ray Data.

This is the only package that imports ray.data. Read in this order:

    rows               the input's rows, checked and kept where any can be read again
    predictions        finished rows in a journal, and the output file that is made of it
    scores             chrF, BLEU and exact matches
    beam_search        scores and hypotheses of many searches at once
    kv_cache           keys and values of running searches, in stores that no step moves
    cached_attention   attention over these stores, in a prefill and in a decode step
    decode_programs    what a program of a decode step's attention reads and adds up
    decode_kernel      the attention of a decode step as a Triton kernel
    choice_kernel      the likeliest tokens of many rows, as Triton kernels
    beam_engine        the loop: prompts join, are searched together, and leave when they are done
    engine             from token ids to texts, by the beam engine or by transformers
    attempts           rows whose process died: tried apart, and given up in the end
    pipeline           rows through a pool of engines
    job                one batch job, which can be resumed
"""
