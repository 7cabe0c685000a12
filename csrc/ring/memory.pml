/* Memory as C++ has it, for ring.pml: a load may return any value from the oldest that is allowed to
 * the newest; a seq_cst one at least the last that was stored seq_cst. */

typedef Counter { /* one process stores it, the other loads it */
    byte now;     /* the last value stored */
    byte sc;      /* the last one stored seq_cst: the oldest that a seq_cst load may return */
    byte seen;    /* the last one its reader got: the oldest that any load may return */
    byte stored   /* bit v: v was stored and the reader is not past it */
};

typedef Flag {
    bit now; /* the last value in the order of modifications */
    bit sc;  /* the last one written seq_cst */
    bit seen /* the last one the peer got */
};

#define WEAKER 0 /* release for a store, acquire for a load */
#define SEQ_CST 1

/* The reader has this value now, so it never gets an older one. */
inline advance(counter, value) {
    if
    :: AHEAD(value, counter.seen) > AHEAD(counter.sc, counter.seen) -> counter.sc = value
    :: else
    fi;
    do
    :: counter.seen == value -> break
    :: else ->
        counter.seen = (counter.seen + 1) % LAPS;
        counter.stored = counter.stored & (255 - (1 << counter.seen))
    od
}

/* Any value that was stored, from the oldest allowed to the newest. */
inline load(counter, order, value) {
    value = (order == SEQ_CST -> counter.sc : counter.seen);
    do
    :: break
    :: value != counter.now ->
        do
        ::  value = (value + 1) % LAPS;
            if
            :: counter.stored & (1 << value) -> break
            :: else
            fi
        od
    od;
    advance(counter, value)
}

inline store(counter, order, value) {
    d_step {
        counter.now = value;
        counter.stored = counter.stored | (1 << value);
        counter.sc = (order == SEQ_CST -> value : counter.sc)
    }
}

inline announce(flag, order) {
    d_step {
        flag.now = 1;
        flag.sc = (order == SEQ_CST -> 1 : flag.sc)
    }
}

/* A relaxed store: `sc` stays, and the peer may go on finding the announcement. */
inline disarm(flag) {
    flag.now = 0
}

/* A seq_cst load and, if it found something, a seq_cst exchange. Each may come before the sleeper's
 * last disarm, but not before its last announcement. */
inline take(flag, taken) {
    atomic {
#ifdef BUG_TAKE_LOAD_ACQUIRE
        if
        :: taken = flag.seen
        :: taken = flag.now
        fi;
        flag.seen = taken
#else
        if
        :: taken = flag.sc
        :: taken = flag.now; flag.sc = taken
        fi
#endif
    }
    if
    :: taken ->
        atomic {
            if
            :: taken = flag.sc
            :: taken = flag.now
            fi;
            flag.now = 0;
            flag.sc = 0;
            flag.seen = 0
        }
    :: else
    fi
}
