/* One ring (ring.h) with both its ends, for ring.pml. */

/* ---- memory orders, with the mistakes in them */

#ifdef BUG_HEAD_STORE_RELEASE
#define HEAD_STORE WEAKER
#else
#define HEAD_STORE SEQ_CST
#endif
#ifdef BUG_HEAD_LOOK_ACQUIRE
#define HEAD_LOOK WEAKER
#else
#define HEAD_LOOK SEQ_CST
#endif
#ifdef BUG_TAIL_STORE_RELEASE
#define TAIL_STORE WEAKER
#else
#define TAIL_STORE SEQ_CST
#endif
#ifdef BUG_TAIL_LOOK_ACQUIRE
#define TAIL_LOOK WEAKER
#else
#define TAIL_LOOK SEQ_CST
#endif
#ifdef BUG_SLEEPS_STORE_RELEASE
#define SLEEPS_STORE WEAKER
#else
#define SLEEPS_STORE SEQ_CST
#endif
#ifdef BUG_WAITS_STORE_RELEASE
#define WAITS_STORE WEAKER
#else
#define WAITS_STORE SEQ_CST
#endif

/* For the property `progress` of ring.pml. */
#ifdef PROGRESS
#define SENDING(r, number) \
    d_step { if :: (number) % NUMBERS == 0 -> ring[r].zero = 1 :: else fi }
#define RECEIVED(r, number) \
    d_step { if :: number == 0 -> ring[r].zero = 0 :: else fi }
#else
#define SENDING(r, number) true
#define RECEIVED(r, number) true
#endif

/* ---- csrc/ring/ring.h, the producer. Its own counter is its own: reading that is no step. */

#define BETWEEN(head, tail) assert(AHEAD(head, tail) <= CELLS)
#ifdef BUG_ROOM_OVERCOUNTED
#define FITS(size, head, tail) (AHEAD(head, tail) + size <= CELLS + 1)
#else
#define FITS(size, head, tail) (AHEAD(head, tail) + size <= CELLS)
#endif

inline choose_size(size) {
    if
    :: size = 1
    :: LONGEST > 1 -> size = LONGEST
    fi
}

inline write_cell(r, at, value) {
    d_step {
#ifdef BUG_HEAD_RELAXED
        ring[r].before[at] = ring[r].cell[at];
#endif
        ring[r].cell[at] = value
    }
}

inline batch_begin(r) {
    atomic {
        load(ring[r].tail, WEAKER, tail);
        head = ring[r].head.now;
        BETWEEN(head, tail)
    }
}

/* The caller has looked for room. */
inline batch_add(r, size) {
    write_cell(r, PLACE(head), FIRST_CELL(number, size));
    if
    :: size == 2 -> write_cell(r, PLACE(head + 1), SECOND_CELL(number))
    :: else
    fi;
    head = (head + size) % LAPS;
    number = (number + 1) % NUMBERS
}

/* And Sender._wake_peer. */
inline batch_publish(r, peer_bell) {
#ifdef BUG_WAKE_BEFORE_PUBLISH
    take(ring[r].consumer_sleeps, taken);
    store(ring[r].head, HEAD_STORE, head);
#else
    store(ring[r].head, HEAD_STORE, head);
    take(ring[r].consumer_sleeps, taken);
#endif
    if
    :: taken -> peer_bell = 1
    :: else
    fi
}

inline try_put(r, size, peer_bell, done) {
    batch_begin(r);
    done = FITS(size, head, tail);
    if
    :: done -> batch_add(r, size); batch_publish(r, peer_bell)
    :: else
    fi
}

inline arm_producer(r, size, armed) {
#ifndef BUG_PRODUCER_LOOKS_FIRST
    announce(ring[r].producer_waits, WAITS_STORE);
#endif
    atomic {
        load(ring[r].tail, TAIL_LOOK, tail);
        head = ring[r].head.now;
        BETWEEN(head, tail);
        armed = !FITS(size, head, tail);
        if
        :: armed
        :: else -> disarm(ring[r].producer_waits)
        fi
    }
#ifdef BUG_PRODUCER_LOOKS_FIRST
    if
    :: armed -> announce(ring[r].producer_waits, WAITS_STORE)
    :: else
    fi
#endif
}

/* ---- csrc/ring/ring.h, the consumer */

inline read_cell(r, at, value) {
#ifdef BUG_HEAD_RELAXED
    if
    :: value = ring[r].before[at]
    :: value = ring[r].cell[at]
    fi
#else
    value = ring[r].cell[at]
#endif
}

/* Whole and in order, or the assertions fail. */
inline read_record(r) {
    atomic {
        read_cell(r, PLACE(tail), cell);
        size = (cell % 8) / 2;
        assert(cell == FIRST_CELL(due, size) && size > 0 && size <= AHEAD(head, tail))
    }
    if
    :: size == 2 ->
        atomic {
            read_cell(r, PLACE(tail + 1), cell);
            assert(cell == SECOND_CELL(due))
        }
    :: else
    fi;
    RECEIVED(r, due);
    tail = (tail + size) % LAPS;
    due = (due + 1) % NUMBERS
}

/* Some or all of the records, and Receiver.drain's ring for room. */
inline drain(r, peer_bell) {
    atomic {
        load(ring[r].head, WEAKER, head);
        tail = ring[r].tail.now;
        BETWEEN(head, tail)
    }
#ifdef BUG_TAIL_RELAXED
    if
    :: head != tail -> store(ring[r].tail, TAIL_STORE, head)
    :: else
    fi;
#endif
    taken = 0;
    do
    :: head != tail -> read_record(r); taken = 1
    :: head == tail -> break
#ifndef BUG_TAIL_RELAXED
    :: taken -> break
#endif
    od;
    if
    :: taken ->
#ifdef BUG_WAKE_BEFORE_ROOM
        take(ring[r].producer_waits, taken);
        store(ring[r].tail, TAIL_STORE, tail);
#else
        store(ring[r].tail, TAIL_STORE, tail);
        take(ring[r].producer_waits, taken);
#endif
        if
        :: taken -> peer_bell = 1
        :: else
        fi
    :: else
    fi
}

inline arm_consumer(r, armed) {
#ifndef BUG_CONSUMER_LOOKS_FIRST
    announce(ring[r].consumer_sleeps, SLEEPS_STORE);
#endif
    atomic {
        load(ring[r].head, HEAD_LOOK, head);
        BETWEEN(head, ring[r].tail.now);
        armed = (head == ring[r].tail.now);
        if
        :: armed
        :: else -> disarm(ring[r].consumer_sleeps)
        fi
    }
#ifdef BUG_CONSUMER_LOOKS_FIRST
    if
    :: armed -> announce(ring[r].consumer_sleeps, SLEEPS_STORE)
    :: else
    fi
#endif
}
