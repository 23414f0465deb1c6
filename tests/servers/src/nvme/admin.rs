//! NVMe 1.4 §5: admin commands.

use std::collections::btree_map::Entry;

use super::command::{Completion, Status, Submission, high, low};
use super::queue::{CompletionQueue, SubmissionQueue};
use super::registers::MAX_ENTRIES;
use super::{Nvme, VECTORS, identify, prp};

const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION_QUEUE: u8 = 0x04;
const CREATE_COMPLETION_QUEUE: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const ASYNC_EVENT_REQUEST: u8 = 0x0c;

const VOLATILE_WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;

const EVERY_NAMESPACE: u32 = u32::MAX;

impl Nvme {
    /// Executes an admin command; none is the answer of one that is kept.
    pub(super) fn admin(&mut self, command: &Submission) -> Option<(u32, Status)> {
        let done = match command.opcode {
            CREATE_COMPLETION_QUEUE => self.create_completion_queue(command),
            CREATE_SUBMISSION_QUEUE => self.create_submission_queue(command),
            DELETE_SUBMISSION_QUEUE => self.delete_submission_queue(low(command.words[0])),
            DELETE_COMPLETION_QUEUE => self.delete_completion_queue(low(command.words[0])),
            IDENTIFY => self.identify(command),
            GET_LOG_PAGE => self.log_page(command),
            ABORT => return Self::success(self.abort(command)),
            SET_FEATURES | GET_FEATURES => return Some(self.features(command)),
            ASYNC_EVENT_REQUEST if self.events.len() > usize::from(identify::EVENTS) => {
                Err(Status::TOO_MANY_EVENTS)
            }
            ASYNC_EVENT_REQUEST => {
                // Nothing here ever happens of itself.
                self.events.push(command.id);
                return None;
            }
            _ => Err(Status::INVALID_OPCODE),
        };
        Some((0, done.err().unwrap_or(Status::SUCCESS)))
    }

    fn create_completion_queue(&mut self, command: &Submission) -> Result<(), Status> {
        let (id, size) = new_queue(command)?;
        let vector = match command.words[1] {
            flags if flags & 1 == 0 => return Err(Status::INVALID_FIELD),
            flags if flags & 2 == 0 => None,
            flags if high(flags) < VECTORS => Some(high(flags)),
            _ => return Err(Status::INVALID_VECTOR),
        };
        let Entry::Vacant(place) = self.completion.entry(id) else { return Err(Status::INVALID_QUEUE) };
        place.insert(CompletionQueue::new(command.prp[0], size, vector));
        self.bar.store(Self::doorbell(id, 1), 0);
        Ok(())
    }

    fn create_submission_queue(&mut self, command: &Submission) -> Result<(), Status> {
        let (id, size) = new_queue(command)?;
        let completion = high(command.words[1]);
        if command.words[1] & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if completion == 0 || !self.completion.contains_key(&completion) {
            return Err(Status::INVALID_COMPLETION_QUEUE);
        }
        let Entry::Vacant(place) = self.submission.entry(id) else { return Err(Status::INVALID_QUEUE) };
        place.insert(SubmissionQueue::new(command.prp[0], size, completion));
        self.bar.store(Self::doorbell(id, 0), 0);
        Ok(())
    }

    fn delete_submission_queue(&mut self, id: u16) -> Result<(), Status> {
        // Commands end before the next is begun, so there is none to wait for.
        if id == 0 { None } else { self.submission.remove(&id) }.map(|_| ()).ok_or(Status::INVALID_QUEUE)
    }

    fn delete_completion_queue(&mut self, id: u16) -> Result<(), Status> {
        if id == 0 || !self.completion.contains_key(&id) {
            return Err(Status::INVALID_QUEUE);
        }
        if self.submission.values().any(|queue| queue.completion == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.completion.remove(&id);
        Ok(())
    }

    fn identify(&self, command: &Submission) -> Result<(), Status> {
        let page = match (low(command.words[0]) & 0xff, command.namespace) {
            (0, 1) => identify::namespace(self.blocks),
            (0, EVERY_NAMESPACE) => identify::namespace(0),
            (0, _) => return Err(Status::INVALID_NAMESPACE),
            (1, _) => identify::controller(),
            (2, after) => identify::active(after),
            (3, 1) => identify::descriptors(),
            (3, _) => return Err(Status::INVALID_NAMESPACE),
            _ => return Err(Status::INVALID_FIELD),
        };
        self.answer(command, &page)
    }

    /// Error, health and firmware logs, in which nothing has happened.
    fn log_page(&self, command: &Submission) -> Result<(), Status> {
        const TEMPERATURE: u16 = 300;
        let page = command.words[0] & 0xff;
        if !(1..=3).contains(&page) {
            return Err(Status::INVALID_LOG_PAGE);
        }
        let words = u64::from(high(command.words[0])) | u64::from(low(command.words[1])) << 16;
        let length = usize::try_from((words + 1) * 4).unwrap_or(usize::MAX).min(identify::SIZE);
        let mut data = vec![0; length];
        if page == 2 {
            // Kelvin, and all of the spare blocks.
            let [cold, warm] = TEMPERATURE.to_le_bytes();
            for (to, from) in data.iter_mut().zip([0, cold, warm, 100, 10]) {
                *to = from;
            }
        }
        self.answer(command, &data)
    }

    fn answer(&self, command: &Submission, data: &[u8]) -> Result<(), Status> {
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let pieces = prp::pieces(&self.memory, command.prp, length)?;
        prp::write(&self.memory, &pieces, data).map_err(|_| Status::DATA_TRANSFER_ERROR)
    }

    /// 0 when the command was aborted, 1 when it had ended or was never there.
    fn abort(&mut self, command: &Submission) -> u32 {
        let (queue, id) = (low(command.words[0]), high(command.words[0]));
        let found = self.events.iter().position(|event| queue == 0 && *event == id);
        // Only event requests wait.
        let Some(event) = found.map(|at| self.events.remove(at)) else { return 1 };
        let head = self.submission.get(&0).map_or(0, |queue| queue.head);
        let status = Status::ABORT_REQUESTED;
        self.complete(0, &Completion { result: 0, head, queue: 0, command: event, status });
        0
    }

    fn features(&mut self, command: &Submission) -> (u32, Status) {
        let [feature, _, _, _] = command.words[0].to_le_bytes();
        let queues = u32::from(VECTORS - 2) | u32::from(VECTORS - 2) << 16;
        let known = matches!(feature, 0x01..=0x0b);
        match (command.opcode, feature) {
            _ if !known => (0, Status::INVALID_FIELD),
            // As many as there are vectors, less the one of the admin queue; counted from 0.
            (_, NUMBER_OF_QUEUES) => (queues, Status::SUCCESS),
            (SET_FEATURES, _) => {
                self.features.insert(feature, command.words[1]);
                (0, Status::SUCCESS)
            }
            (_, VOLATILE_WRITE_CACHE) => (self.features.get(&feature).copied().unwrap_or(1), Status::SUCCESS),
            _ => (self.features.get(&feature).copied().unwrap_or(0), Status::SUCCESS),
        }
    }
}

fn new_queue(command: &Submission) -> Result<(u16, u16), Status> {
    let (id, less_one) = (low(command.words[0]), high(command.words[0]));
    if id == 0 || id >= VECTORS {
        return Err(Status::INVALID_QUEUE);
    }
    if less_one == 0 || less_one > MAX_ENTRIES {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    if !command.prp[0].is_multiple_of(4096) {
        return Err(Status::INVALID_PRP);
    }
    Ok((id, less_one + 1))
}
