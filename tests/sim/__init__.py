"""A whole kvray cluster in one process: real cores and codec, everything else played by dice.

    __main__ ── many seeds, all cores ──▶ run ── one seed ──▶ World
                                                               │
      Schedule   what happens next, in virtual microseconds    │
      Story      what has happened, its digest, faults counted │
      Machine    a host: its clock, its slab, its NodeStore    ├── each event is one call into
      NodeProcess  one life of a NodeStore: a NodeCore's shell │   one of these, then checks
      Network    calls to the directory, partitions            │
      Transfer   one one-sided read, piece by piece            │
      Directory  the directory actor, and Ray's death notices  │
      Engine     EngineCore and worker: requests, copies       │
      Faults     what goes wrong, and when                     │
      heal       all faults end: what must be true then ───────┘

One seed decides everything: the same seed gives the same story, byte for byte. Virtual time costs
nothing, so 30 seconds of five nodes take well under a second.
"""
