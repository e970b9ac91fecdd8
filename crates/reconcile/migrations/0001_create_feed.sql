-- The change feed: what changed, in the order of commits, without gaps.

CREATE SCHEMA IF NOT EXISTS reconcile;

-- One row per topic. A writer increments `version` as the last statement of its transaction, so the
-- row's lock is held until the commit is visible and versions become visible in their own order.
CREATE TABLE reconcile.feed_head (
    topic   text   PRIMARY KEY,
    -- Names this history. A database restored from a backup gets a new one, because its versions
    -- would otherwise mean something else than the readers remember.
    epoch   uuid   NOT NULL DEFAULT gen_random_uuid(),
    version bigint NOT NULL DEFAULT 0 CHECK (version >= 0)
);

CREATE TABLE reconcile.feed (
    topic      text        NOT NULL,
    version    bigint      NOT NULL CHECK (version > 0),
    key        uuid        NOT NULL,
    payload    bytea       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (topic, version)
);

-- The last version that retention has removed. Not a column of `feed_head`: removing old entries must
-- not make writers wait.
CREATE TABLE reconcile.feed_floor (
    topic   text   PRIMARY KEY,
    version bigint NOT NULL CHECK (version >= 0)
);
