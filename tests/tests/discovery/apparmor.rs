// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hosts where AppArmor restricts the programs that libvirt may start.

use std::path::PathBuf;

use crate::check::assert_finding;
use crate::{DATA, PLAIN, Tree};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const PROFILE: &str = "/etc/apparmor.d/usr.sbin.libvirtd";

/// The rules of Debian 12, as far as programs are concerned.
const LIBVIRTD: &str = r#"#include <tunables/global>
@{LIBVIRT}="libvirt"

profile libvirtd /usr/sbin/libvirtd flags=(attach_disconnected) {
  #include <abstractions/base>

  / r,
  /** rwmkl,

  /bin/* PUx,
  /sbin/* PUx,
  /usr/bin/* PUx,
  /usr/sbin/virtlogd pix,
  /usr/sbin/* PUx,
  /{usr/,}lib/udev/scsi_id PUx,
  /usr/{lib,lib64,lib/qemu,libexec}/vhost-user-gpu PUx,
  /usr/{lib,lib64,lib/qemu,libexec}/virtiofsd PUx,

  audit deny /{usr/,}sbin/apparmor_parser rwxl,

  /usr/{lib,lib64,lib/qemu,libexec}/qemu-bridge-helper Cx -> qemu_bridge_helper,
  profile qemu_bridge_helper {
   /usr/libexec/nested rmix,
  }

  #include <local/usr.sbin.libvirtd>
}
"#;

/// Returns a host with AppArmor and this profile, and a GPU whose program is `binary`. Returns its descriptor.
fn host(profile: &str, binary: &str) -> (Tree, PathBuf) {
    let tree = Tree::new();
    tree.file(ENABLED, "Y\n");
    tree.file(PROFILE, profile);
    tree.program(binary, PLAIN);
    let file = tree.descriptor(&format!("{DATA}/50.json"), "gpu", binary);
    (tree, file)
}

#[test]
fn a_program_outside_the_profile_is_a_finding() {
    for binary in [
        "/usr/libexec/vhost-device/vhost-device-gpu",
        "/usr/local/bin/vhost-device-gpu",
        "/usr/libexec/nested",
        "/usr/sbin/apparmor_parser",
    ] {
        let (tree, file) = host(LIBVIRTD, binary);
        let rule = format!("{PROFILE} has no rule for it, such as `{binary} PUx,`");
        assert_finding(&tree.check(), &file, &rule, "/etc/apparmor.d/local");
    }
}

#[test]
fn a_program_in_the_profile_is_no_finding() {
    for binary in [
        "/usr/bin/vhost-device-gpu",
        "/usr/lib/qemu/vhost-user-gpu",
        "/usr/libexec/vhost-user-gpu",
    ] {
        let (tree, _) = host(LIBVIRTD, binary);
        tree.check().assert_silent();
    }
}

#[test]
fn the_suggested_rule_is_accepted() {
    let binary = "/usr/local/bin/vhost-device-gpu";
    let (tree, _) = host(LIBVIRTD, binary);
    let local = "/etc/apparmor.d/local/usr.sbin.libvirtd";
    tree.file(local, format!("# ours\n{binary} PUx,\n"));
    tree.check().assert_silent();
    tree.file(local, "/usr/local/bin/vhost-device-* PUx,\n");
    tree.check().assert_silent();
}

#[test]
fn links_are_followed() {
    let (tree, _) = host(LIBVIRTD, "/usr/bin/vhost-device-gpu");
    tree.link("/opt/gpu", "/usr/bin/vhost-device-gpu");
    tree.descriptor(&format!("{DATA}/50.json"), "gpu", "/opt/gpu");
    tree.check().assert_silent();
}

#[test]
fn a_profile_that_is_not_in_force_is_not_asked() {
    let binary = "/opt/gpu";
    let (tree, _) = host(LIBVIRTD, binary);
    tree.file(ENABLED, "N\n");
    tree.check().assert_silent();
    for how in ["disable", "force-complain"] {
        let (tree, _) = host(LIBVIRTD, binary);
        tree.link(&format!("/etc/apparmor.d/{how}/usr.sbin.libvirtd"), PROFILE);
        tree.check().assert_silent();
    }
    let complaining = LIBVIRTD.replace("flags=(", "flags=(complain,");
    let (tree, _) = host(&complaining, binary);
    tree.check().assert_silent();
}

#[test]
fn the_profile_of_the_modular_daemon_is_asked_too() {
    let (tree, file) = host(LIBVIRTD, "/usr/bin/vhost-device-gpu");
    let profile = "profile virtqemud /usr/sbin/virtqemud {\n  /usr/sbin/* PUx,\n}\n";
    tree.file("/etc/apparmor.d/usr.sbin.virtqemud", profile);
    assert_finding(&tree.check(), &file, "usr.sbin.virtqemud", "/usr/bin");
}

#[test]
fn devices_that_libvirt_does_not_start_may_be_anywhere() {
    let (tree, file) = host(LIBVIRTD, "/usr/bin/vhost-device-gpu");
    std::fs::remove_file(file).unwrap();
    tree.program("/opt/rng", r#"echo '{"type":"rng"}'"#);
    tree.descriptor(&format!("{DATA}/50.json"), "rng", "/opt/rng");
    // Nor does libvirt see this one.
    tree.back_end("/usr/local/share/qemu/vhost-user", "60-gpu", PLAIN);
    tree.check().assert_silent();
}
