/* The two rings of a channel and their doorbells, for the model checker spin. docs/ring-model.md
 * says which part stands for which code, and what is assumed.
 *
 * The coordinator fills the inbox, which the worker empties; the worker fills the outbox, which the
 * coordinator empties. A thread of the worker wakes it for a reason that no ring knows of. Nothing
 * here is saved by a timeout: a sleeper with work and no bell on its way is a fault (STUCK), even
 * where timeouts would end the sleep.
 *
 * The memory is that of C++, not of one processor (memory.pml). core.pml is one ring.
 *
 * Each BUG_ name is the code with one mistake; model.sh wants every one of them found.
 */

/* ---- what is modelled in one run; model.sh chooses */

#ifndef CELLS
#define CELLS 1 /* of a ring, at most 4; a record takes one or LONGEST, which is at most 2 */
#endif
#ifndef LONGEST
#define LONGEST 1
#endif
#ifndef QUEUE
#define QUEUE 1 /* records that may wait in the coordinator */
#endif
#ifndef TO_WORKER
#define TO_WORKER 1
#endif
#ifndef TO_COORDINATOR
#define TO_COORDINATOR 1
#endif
#ifndef WAKES
#define WAKES 1
#endif
#ifndef TIMEOUTS /* the worker's waits may end for no reason */
#define TIMEOUTS 0
#endif

/* The code's counters never wrap. Here they are taken modulo two laps, since of two that are
 * compared none is more than one lap ahead. Records are numbered modulo the most that can be under
 * way at once: a missing one, a repeated one and one left of an earlier lap are not what is due. */
#define LAPS (2 * CELLS)
#define NUMBERS (CELLS + QUEUE)
#define AHEAD(a, b) ((a + LAPS - b) % LAPS)
#define PLACE(counter) ((counter) % CELLS)
#define FIRST_CELL(number, size) (8 * number + 2 * size)
#define SECOND_CELL(number) (8 * number + 1)

#include "memory.pml"

/* ---- what the processes share */

typedef Ring {
    Counter head;
    Counter tail;
    Flag consumer_sleeps;
    Flag producer_waits;
#ifdef BUG_HEAD_RELAXED
    byte before[CELLS]; /* what a cell held before: still seen where head orders nothing */
#endif
#ifdef PROGRESS
    bit zero; /* record 0 is under way */
#endif
    byte cell[CELLS]
};

#define INBOX 0
#define OUTBOX 1
Ring ring[2];

bit worker_bell;      /* the semaphore: its sleeper takes all rings at once, so one bit is enough */
bit coordinator_bell; /* the eventfd, likewise */
bit woken;            /* BlockingReceiver._woken */
bit finished;         /* what the thread woke the worker for, and it has not looked at yet */
byte queued;          /* records in the coordinator's queue */

/* Where the processes are. Nobody acts on it. */
#define AWAKE 0
#define ASLEEP 1
#define WAITS_FOR_ROOM 2
byte worker_is;
bit coordinator_idle; /* in its event loop */
bit thread_idle = 1;

#include "core.pml"

/* ---- nodeserve/wire/ring.py, the worker */

/* SemaphoreDoorbell.wait */
inline worker_sleeps() {
    atomic {
        if
        :: worker_bell -> worker_bell = 0
        :: TIMEOUTS
        fi;
        worker_is = AWAKE
    }
}

/* BlockingSender.put, again and again as RingLink.put calls it. It sleeps on the worker's only bell
 * and takes every ring of it. */
inline worker_puts() {
    SENDING(OUTBOX, number);
    choose_size(size);
    do
    ::  try_put(OUTBOX, size, coordinator_bell, yes);
        if
        :: yes -> break
        :: else
        fi;
        arm_producer(OUTBOX, size, yes);
        if
        :: yes -> worker_is = WAITS_FOR_ROOM; worker_sleeps()
        :: yes && TIMEOUTS -> disarm(ring[OUTBOX].producer_waits)
        :: !yes
        fi
    od
}

/* BlockingReceiver.wait */
inline worker_waits() {
#ifdef BUG_NO_WOKEN
    yes = 0;
#else
    yes = woken;
#endif
    if
    :: yes
    :: else ->
        arm_consumer(INBOX, yes);
        if
        :: yes ->
            worker_is = ASLEEP;
end_asleep:
            worker_sleeps();
            disarm(ring[INBOX].consumer_sleeps)
        :: else
        fi
    fi;
    woken = 0
}

/* The step loop: a turn looks at everything, and may put and may wait. */
active proctype Worker() {
    byte head, tail, size, cell;
    byte number; /* of the next record to the coordinator */
    byte due;    /* number of the next record from it */
    bit taken, yes;
    do
    ::  drain(INBOX, coordinator_bell);
        finished = 0;
#ifdef BUG_WOKEN_RESET_LATE
        woken = 0;
#endif
        if
        :: TO_COORDINATOR -> worker_puts()
        :: true
        fi;
        if
        :: worker_waits()
        :: true
        fi
    od
}

/* BlockingReceiver.wake */
#if WAKES
active proctype Thread() {
    do
    ::  atomic {
            finished = 1;
            thread_idle = 0
        }
#ifdef BUG_BELL_BEFORE_WOKEN
        worker_bell = 1;
        woken = 1;
#else
        woken = 1;
        worker_bell = 1;
#endif
        thread_idle = 1
    od
}
#endif

/* ---- nodeserve/wire/ring.py, the coordinator */

/* QueueingSender.flush, with put_many. A record's size is chosen when it comes to the front. */
inline flush() {
    do
    :: queued == 0 -> break
    :: else ->
        batch_begin(INBOX);
        yes = 0;
        do
        :: queued > 0 && FITS(front, head, tail) ->
            batch_add(INBOX, front);
            queued--;
            if
            :: queued > 0 -> choose_size(front)
            :: else
            fi;
            yes = 1
        :: queued == 0 || !FITS(front, head, tail) -> break
        :: yes -> break /* FLUSH_RECORDS of them */
        od;
        if
        :: yes -> batch_publish(INBOX, worker_bell)
        :: else ->
#ifdef BUG_NO_ROOM_ANNOUNCED
            break
#else
            arm_producer(INBOX, front, yes);
            if
            :: yes -> break
            :: else
            fi
#endif
        fi
    od
}

/* QueueingSender.post */
inline post() {
    SENDING(INBOX, number + queued);
    if
    :: queued == 0 ->
        choose_size(front);
        try_put(INBOX, front, worker_bell, yes)
#ifdef BUG_POST_OVERTAKES
    :: queued > 0 ->
        number = (number + queued) % NUMBERS;
        try_put(INBOX, 1, worker_bell, yes);
        number = (number + 2 * NUMBERS - queued - yes) % NUMBERS
#else
    :: else -> yes = 0
#endif
    fi;
    if
    :: yes
    :: else ->
        queued++;
        if
        :: queued == 1 -> flush()
        :: else
        fi
    fi
}

/* RungReceiver._announce */
inline announce_sleep() {
    arm_consumer(OUTBOX, yes);
    if
    :: yes
    :: else ->
#ifdef BUG_NO_OWN_RING
        true
#else
        coordinator_bell = 1
#endif
    fi
}

/* CoordinatorEnd.receive */
inline receive() {
#if !defined(BUG_CLEAR_AFTER_ANNOUNCE) && !defined(BUG_CLEAR_AFTER_FLUSH)
    coordinator_bell = 0;
#endif
    drain(OUTBOX, worker_bell);
#ifndef BUG_NO_REANNOUNCE
    announce_sleep();
#endif
#ifdef BUG_CLEAR_AFTER_ANNOUNCE
    coordinator_bell = 0;
#endif
#ifndef BUG_NO_FLUSH
    flush();
#endif
#ifdef BUG_CLEAR_AFTER_FLUSH
    coordinator_bell = 0
#endif
}

/* The event loop: a turn serves a client, or the bell, or both. */
active proctype Coordinator() {
    byte head, tail, size, cell;
    byte front;  /* size of the queue's first record */
    byte number; /* of that record, or of the next if there is none */
    byte due;    /* number of the next record from the worker */
    bit taken, yes;
    announce_sleep();
    coordinator_idle = 1;
end_idle:
    do
    ::  atomic {
            if
            :: TO_WORKER && queued < QUEUE -> yes = 1
            :: coordinator_bell -> yes = 0
            fi;
            coordinator_idle = 0
        }
        if
        :: yes -> post()
        :: else
        fi;
        if
#ifdef BUG_CLIENTS_FIRST
        :: coordinator_bell && !(TO_WORKER && queued < QUEUE) -> receive()
#else
        :: coordinator_bell -> receive()
#endif
        :: else
        fi;
        coordinator_idle = 1
    od
}

/* ---- what must hold, besides the assertions on counters and records above */

#ifndef PROGRESS

/* There is something to do, and whoever could do it sleeps without a bell on its way. */
#define STUCK \
    (worker_is != AWAKE && !worker_bell && coordinator_idle && !coordinator_bell && thread_idle && \
     (worker_is == WAITS_FOR_ROOM || queued > 0 || finished || \
      ring[INBOX].head.now != ring[INBOX].tail.now || \
      ring[OUTBOX].head.now != ring[OUTBOX].tail.now))

active proctype Watch() {
end_watch:
    STUCK -> assert(false)
}

#else

/* Whatever the others do: no record is under way for ever, be it in a ring, in the queue or in a put
 * that waits for room, and no wake goes unheard. Numbers are only names, so what holds for the
 * records of number 0 holds for all. Checked under weak fairness. */
ltl progress { ([]<> !ring[INBOX].zero) && ([]<> !ring[OUTBOX].zero) && ([]<> !finished) }

/* Stores become visible in finite time, as C++ asks. Only this property needs it: a worker that
 * never waits only loads with acquire. */
#define UNSEEN(counter) (counter.seen != counter.now)

active proctype Memory() {
end_memory:
    do
    ::  atomic {
            UNSEEN(ring[INBOX].head) || UNSEEN(ring[INBOX].tail) ||
                UNSEEN(ring[OUTBOX].head) || UNSEEN(ring[OUTBOX].tail) ->
            advance(ring[INBOX].head, ring[INBOX].head.now);
            advance(ring[INBOX].tail, ring[INBOX].tail.now);
            advance(ring[OUTBOX].head, ring[OUTBOX].head.now);
            advance(ring[OUTBOX].tail, ring[OUTBOX].tail.now)
        }
    od
}

#endif
