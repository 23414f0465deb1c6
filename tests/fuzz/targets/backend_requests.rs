//! Requests on the backend's own channel: decoded, and carried out by a machine that checks them.
#![no_main]

use fuzz::descriptors::{any, none_left};
use fuzz::handler::Handler;
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use transport::vhost_user::backend_requests::{BackendMessage, BackendRequests, parse_request};
use transport::vhost_user::request::BackendRequest;

fuzz_target!(|data: &[u8]| {
    none_left(|| {
        let mut input = Input::new(data);
        let handler = Handler::default();
        while !input.is_empty() {
            one(&mut input, &handler);
        }
    });
});

fn one(input: &mut Input, handler: &Handler) {
    let request = BackendRequest(u32::from(input.byte() % 13));
    let _ = (request.to_string(), request.needs());
    let fds = (0..input.pick(&[1, 0, 1, 2])).map(|_| any(input)).collect();
    let payload = match input.byte() % 4 {
        0 => input.bytes(64),
        words => {
            let fields = [5, 3, 4][usize::from(words) - 1];
            let mut payload: Vec<u8> = (0..fields).flat_map(|_| input.number().to_ne_bytes()).collect();
            if words < 3 {
                payload[1..8].fill(0);
            }
            payload
        }
    };
    let message = match parse_request(request, &payload, fds) {
        Ok(message) => message,
        Err(fault) => return drop(fault.to_string()),
    };
    let _ = match message {
        BackendMessage::Iotlb(iotlb) => handler.iotlb(iotlb),
        BackendMessage::HostNotifier(ring, area) => handler.host_notifier(ring, area),
        BackendMessage::ShmemMap(area, fd) => handler.shmem_map(area, fd),
        BackendMessage::ShmemUnmap(area) => handler.shmem_unmap(area),
        _ => Ok(()),
    };
}
