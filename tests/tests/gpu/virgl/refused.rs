// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalid 3D commands.

use super::*;

#[test]
fn invalid_3d_commands_are_refused() {
    let Some(device) = start(&["--headless", "--max-hostmem=1M"]) else {
        return;
    };
    let mut driver = device.connect();
    create_context(&mut driver);
    driver.done(number::CREATE_3D, &picture(1, 16, 16, 0));
    driver.done(number::CREATE_3D, &picture(2, 16, 16, 0));
    driver.attach(2, 4096);
    driver.create(5, B8G8R8X8, 16, 16);
    let created = |what: [u32; 4], shape: [u32; 8]| [words(&what), words(&shape)].concat();
    let buffer = |size| created([6, BUFFER, 64, VERTICES], [size, 1, 1, 1, 0, 0, 0, 0]);
    let long_name = [words(&[65, 0]), vec![0; 64]].concat();
    let all = [0, 0, 16, 16];
    let outside = [1, 0, 16, 16];
    let wraps = [u32::MAX, 0, 2, 1];
    let create = number::CREATE_3D;
    let to_host = number::TRANSFER_TO_HOST_3D;
    let from_host = number::TRANSFER_FROM_HOST_3D;
    let (parameter, resource) = (number::INVALID_PARAMETER, number::INVALID_RESOURCE_ID);
    let cases = [
        (
            "a context twice",
            CONTEXT,
            number::CTX_CREATE,
            context(),
            number::INVALID_CONTEXT_ID,
        ),
        (
            "context 0",
            0,
            number::CTX_CREATE,
            context(),
            number::INVALID_CONTEXT_ID,
        ),
        ("a long name", 8, number::CTX_CREATE, long_name, parameter),
        (
            "half a context",
            8,
            number::CTX_CREATE,
            context()[..70].to_vec(),
            parameter,
        ),
        (
            "an end of nothing",
            9,
            number::CTX_DESTROY,
            Vec::new(),
            number::INVALID_CONTEXT_ID,
        ),
        (
            "use by nothing",
            9,
            number::CTX_ATTACH_RESOURCE,
            words(&[1, 0]),
            number::INVALID_CONTEXT_ID,
        ),
        (
            "use of nothing",
            CONTEXT,
            number::CTX_ATTACH_RESOURCE,
            words(&[9, 0]),
            resource,
        ),
        (
            "no use of nothing",
            CONTEXT,
            number::CTX_DETACH_RESOURCE,
            words(&[9, 0]),
            resource,
        ),
        ("resource 0", 0, create, picture(0, 1, 1, 0), resource),
        ("a number twice", 0, create, picture(1, 1, 1, 0), resource),
        (
            "the number of a 2D resource",
            0,
            create,
            picture(5, 1, 1, 0),
            resource,
        ),
        (
            "more than there is room for",
            0,
            create,
            picture(6, 600, 600, 0),
            number::OUT_OF_MEMORY,
        ),
        (
            "a size that overflows",
            0,
            create,
            picture(6, u32::MAX, u32::MAX, 0),
            number::OUT_OF_MEMORY,
        ),
        (
            "a long buffer",
            0,
            create,
            buffer(2 << 20),
            number::OUT_OF_MEMORY,
        ),
        (
            "layers without end",
            0,
            create,
            created([6, 2, 2, PICTURE], [1, 1, u32::MAX, u32::MAX, 0, 0, 0, 0]),
            number::OUT_OF_MEMORY,
        ),
        (
            "an unknown target",
            0,
            create,
            created([6, 99, 2, PICTURE], [1, 1, 1, 1, 0, 0, 0, 0]),
            parameter,
        ),
        (
            "an unknown format",
            0,
            create,
            created([6, 2, 9999, PICTURE], [1, 1, 1, 1, 0, 0, 0, 0]),
            parameter,
        ),
        (
            "no memory behind it",
            0,
            to_host,
            transfer(all, 0, 1, 0),
            number::UNSPEC,
        ),
        (
            "a transfer of nothing",
            0,
            to_host,
            transfer(all, 0, 9, 0),
            resource,
        ),
        (
            "a transfer in no context",
            9,
            to_host,
            transfer(all, 0, 2, 0),
            number::INVALID_CONTEXT_ID,
        ),
        (
            "a transfer past the edge",
            0,
            to_host,
            transfer(outside, 0, 2, 0),
            parameter,
        ),
        (
            "a transfer that wraps",
            0,
            from_host,
            transfer(wraps, 0, 2, 0),
            parameter,
        ),
        (
            "a transfer past the backing",
            0,
            from_host,
            transfer(all, 4000, 2, 0),
            parameter,
        ),
        (
            "an offset that overflows",
            0,
            to_host,
            transfer(all, u64::MAX, 2, 0),
            parameter,
        ),
        (
            "a wide stride",
            0,
            from_host,
            transfer(all, 0, 2, u32::MAX),
            parameter,
        ),
        (
            "a 2D transfer past the edge",
            0,
            number::TRANSFER_TO_HOST_2D,
            [words(&outside), vec![0; 8], words(&[5, 0])].concat(),
            parameter,
        ),
        (
            "a 2D transfer past the backing",
            0,
            number::TRANSFER_TO_HOST_2D,
            [words(&all), words(&[4000, 0, 5, 0])].concat(),
            parameter,
        ),
        (
            "a 2D transfer of an offset that overflows",
            0,
            number::TRANSFER_TO_HOST_2D,
            [words(&all), vec![0xff; 8], words(&[5, 0])].concat(),
            parameter,
        ),
        (
            "a 2D transfer with no memory behind it",
            0,
            number::TRANSFER_TO_HOST_2D,
            [words(&all), vec![0; 8], words(&[1, 0])].concat(),
            number::UNSPEC,
        ),
        (
            "the number of a 3D resource",
            0,
            number::CREATE_2D,
            words(&[1, B8G8R8X8, 1, 1]),
            resource,
        ),
        (
            "more 2D than there is room for",
            0,
            number::CREATE_2D,
            words(&[6, B8G8R8X8, 600, 600]),
            number::OUT_OF_MEMORY,
        ),
        (
            "a second backing",
            0,
            number::ATTACH_BACKING,
            [words(&[2, 1]), vec![0; 16]].concat(),
            number::UNSPEC,
        ),
        (
            "a backing that is no memory",
            0,
            number::ATTACH_BACKING,
            words(&[1, 1, 0, 0xffff, 4096, 0]),
            number::UNSPEC,
        ),
        (
            "no backing to detach",
            0,
            number::DETACH_BACKING,
            words(&[1, 0]),
            number::UNSPEC,
        ),
        (
            "commands in no context",
            9,
            number::SUBMIT_3D,
            submit(&[0]),
            number::INVALID_CONTEXT_ID,
        ),
        (
            "fewer commands than said",
            CONTEXT,
            number::SUBMIT_3D,
            words(&[100, 0]),
            parameter,
        ),
        (
            "half a word",
            CONTEXT,
            number::SUBMIT_3D,
            [words(&[3, 0]), vec![0; 3]].concat(),
            parameter,
        ),
        (
            "commands without end",
            CONTEXT,
            number::SUBMIT_3D,
            words(&[u32::MAX - 3, 0]),
            parameter,
        ),
        (
            "no command",
            CONTEXT,
            number::SUBMIT_3D,
            submit(&[0xdead_beef; 20]),
            parameter,
        ),
        ("a blob", 0, 0x10c, vec![0; 32], number::UNSPEC),
        ("a mapping", 0, 0x208, vec![0; 16], number::UNSPEC),
    ];
    for (what, context, kind, body, expected) in cases {
        let response = driver.run(&in_context(context, kind, &body));
        assert_eq!(response.kind(), expected, "{what}");
        assert_eq!(response.bytes.len(), 24, "{what}");
    }
    // The device still works, in another context: the library drops a context that sent invalid commands.
    done_in(&mut driver, 8, number::CTX_CREATE, &context());
    done_in(&mut driver, 8, number::CTX_ATTACH_RESOURCE, &words(&[1, 0]));
    done_in(&mut driver, 8, number::CTX_ATTACH_RESOURCE, &words(&[5, 0]));
    done_in(
        &mut driver,
        8,
        number::SUBMIT_3D,
        &submit(&clear(1, [1.0; 3])),
    );
}
