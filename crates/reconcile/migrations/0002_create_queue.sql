-- The work queue: one row per key, however many changes it stands for.

-- Fencing tokens are never reused, not even for a key that was forgotten and comes back.
CREATE SEQUENCE reconcile.fencing_token AS bigint;

CREATE TABLE reconcile.queue (
    queue       text        NOT NULL,
    key         uuid        NOT NULL,
    -- Counts enqueues; `taken` is its value when the key was last claimed. Work is left if they differ.
    wanted      bigint      NOT NULL DEFAULT 1,
    taken       bigint      NOT NULL DEFAULT 0,
    -- When a worker may claim the key: now for waiting work, the end of the lease while one has it,
    -- null when there is nothing to do.
    due_at      timestamptz,
    -- Consecutive failures.
    attempt     integer     NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    token       bigint      NOT NULL DEFAULT 0,
    worker      text,
    lease_until timestamptz,
    -- A failure that no retry can mend; the next enqueue clears it.
    parked      boolean     NOT NULL DEFAULT false,
    -- When work on the key last ended, for the slow rotation that examines every key again.
    finished_at timestamptz,
    PRIMARY KEY (queue, key),
    CHECK ((lease_until IS NULL) = (worker IS NULL))
);

CREATE INDEX queue_due ON reconcile.queue (queue, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX queue_idle ON reconcile.queue (queue, finished_at) WHERE due_at IS NULL AND NOT parked;
