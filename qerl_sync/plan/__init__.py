"""Planning: from metadata and a layer map to a `SyncPlan`. Standard library only, no tensor."""
