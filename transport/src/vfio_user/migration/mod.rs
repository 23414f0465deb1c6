//! The parts of vfio-user for migration: device features, the device's migration states and data, and DMA
//! logging.

mod dma_logging;
mod feature;
mod states;

pub use dma_logging::{DirtyPages, DmaRange, parse_logging_start, parse_report};
pub use feature::{FeatureUse, parse_feature};
pub use states::{MigrationState, MigrationSupport, parse_migration_data, parse_migration_state};
