//! NVMe 1.4 §6: commands for the namespace.

use std::os::unix::fs::FileExt;

use super::command::{Status, Submission, low};
use super::{BLOCK, Nvme, prp};

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;

impl Nvme {
    /// Executes an I/O command.
    pub(super) fn io(&mut self, command: &Submission) -> (u32, Status) {
        let done = match command.opcode {
            FLUSH if matches!(command.namespace, 1 | u32::MAX) => {
                self.disk.sync_data().map_err(|error| failed(&error))
            }
            WRITE | READ | WRITE_ZEROES if command.namespace == 1 => self.transfer(command),
            FLUSH | WRITE | READ | WRITE_ZEROES => Err(Status::INVALID_NAMESPACE),
            _ => Err(Status::INVALID_OPCODE),
        };
        (0, done.err().unwrap_or(Status::SUCCESS))
    }

    fn transfer(&self, command: &Submission) -> Result<(), Status> {
        let first = u64::from(command.words[0]) | u64::from(command.words[1]) << 32;
        let blocks = u64::from(low(command.words[2])) + 1;
        if first.checked_add(blocks).is_none_or(|end| end > self.blocks) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let (offset, length) = (first * BLOCK, blocks * BLOCK);
        let room = || vec![0; usize::try_from(length).unwrap_or(0)];
        if command.opcode == WRITE_ZEROES {
            return self.disk.write_all_at(&room(), offset).map_err(|error| failed(&error));
        }
        let pieces = prp::pieces(&self.memory, command.prp, length)?;
        let mut data = room();
        let unreachable = |error| {
            log::warn!("data of {command:x?}: {error}");
            Status::DATA_TRANSFER_ERROR
        };
        if command.opcode == READ {
            self.disk.read_exact_at(&mut data, offset).map_err(|error| failed(&error))?;
            prp::write(&self.memory, &pieces, &data).map_err(unreachable)
        } else {
            prp::read(&self.memory, &pieces, &mut data).map_err(unreachable)?;
            self.disk.write_all_at(&data, offset).map_err(|error| failed(&error))
        }
    }
}

fn failed(error: &std::io::Error) -> Status {
    log::error!("the disk: {error}");
    Status::INTERNAL_ERROR
}
