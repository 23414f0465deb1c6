//! placeholder
use std::io::Result;
use std::path::Path;
use vfio_user::{IrqInfo, Server, ServerRegion};
use crate::serve::{Device, Shared};
/// placeholder
pub fn listen<D: Device + 'static>(_: &Shared<D>, _: &Path, _: Vec<IrqInfo>, _: Vec<ServerRegion>) -> Result<Server> {
    Err(std::io::ErrorKind::Unsupported.into())
}
