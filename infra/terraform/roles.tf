# Who may do what in the store. All but `reader` read all of it, since a stage reads what others made; each writes only where
# its stages do. Deleting is for what a stage itself takes back, and for `gc`. The server and the worker of Prefect need no role:
# they never touch the store.

locals {
  root = var.prefix == "" ? "" : "${var.prefix}/"

  # What says that an artifact is finished.
  manifests = [
    "shards/*/manifest.json", "runs/*/checkpoints/*/manifest.json",
    "samples/*/manifest.json", "scores/*/manifest.json", "reports/*/manifest.json",
  ]

  # objects/ holds what several artifacts share, under the digest of its bytes; pages/ what is shown of them; catalog/ and
  # sets/ list them; probe/ is how a store is tried at start, rehearsals/ how a cluster is (preflight).
  everything = [
    "ledgers/*", "shards/*", "runs/*", "samples/*", "scores/*", "reports/*", "objects/*", "removals/*", "pages/*",
    "catalog/*", "sets/*", "rehearsals/*", "probe/*",
  ]
  passing = ["ledgers/*", "runs/*/states/*", "runs/*/pins/*", "rehearsals/*", "probe/*"]

  roles = {
    data = { # shard/*: ledgers, then shard sets
      accounts = ["vc2-data"]
      writes   = ["ledgers/*", "shards/*", "objects/*", "removals/*", "pages/*", "catalog/*", "sets/*", "probe/*"]
      deletes  = ["ledgers/*", "probe/*"]
    }
    train = { # train/*, precompute: attempts, states, checkpoints; latents are shard sets
      accounts = ["vc2-train"]
      writes   = ["runs/*", "shards/*", "objects/*", "pages/*", "catalog/*", "rehearsals/*", "probe/*"]
      deletes  = ["runs/*/states/*", "runs/*/pins/*", "rehearsals/*", "probe/*"]
    }
    eval = { # evaluate/*, sample/*, compare
      accounts = ["vc2-eval"]
      writes   = ["samples/*", "scores/*", "reports/*", "objects/*", "pages/*", "catalog/*", "probe/*"]
      deletes  = ["probe/*"]
    }
    stages = { # flow runs and Ray clusters that do all of these: whoever may submit to them has what their pods have
      accounts = ["vc2-flow-run", "vc2-ray", "vc2-ray-head"]
      writes   = local.everything
      deletes  = local.passing
    }
    gc = { # vc2 gc, by hand or by a timer: the only one that may take something finished away
      accounts = ["vc2-gc"]
      writes   = ["probe/*"]
      deletes  = ["*"]
    }
    reader = { # who looks at pages, samples, scores, and loads finished weights
      accounts = []
      writes   = []
      deletes  = []
    }
  }

  # A reader sees what is finished, not train states, which are four times the weights.
  reads = { for name, role in local.roles : name => name == "reader" ? ["shards/*", "runs/*/checkpoints/*", "samples/*", "scores/*", "reports/*", "objects/*", "pages/*", "catalog/*"] : ["*"] }
}

data "aws_iam_policy_document" "may_take" {
  for_each = local.roles

  dynamic "statement" {
    for_each = var.oidc_provider_arn == "" || length(each.value.accounts) == 0 ? [] : [1]
    content {
      actions = ["sts:AssumeRoleWithWebIdentity"]
      principals {
        type        = "Federated"
        identifiers = [var.oidc_provider_arn]
      }
      condition {
        test     = "StringEquals"
        variable = "${var.oidc_issuer}:sub"
        values   = [for account in each.value.accounts : "system:serviceaccount:${var.namespace}:${account}"]
      }
      condition {
        test     = "StringEquals"
        variable = "${var.oidc_issuer}:aud"
        values   = ["sts.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = length(each.key == "reader" ? var.readers : var.trusted_principals) == 0 ? [] : [1]
    content {
      actions = ["sts:AssumeRole"]
      principals {
        type        = "AWS"
        identifiers = each.key == "reader" ? var.readers : var.trusted_principals
      }
    }
  }

  # A role that nobody may take yet is still a valid one.
  statement {
    effect  = "Deny"
    actions = ["sts:AssumeRole"]
    principals {
      type        = "AWS"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_iam_role" "this" {
  for_each             = local.roles
  name                 = "${var.bucket}-${each.key}"
  assume_role_policy   = data.aws_iam_policy_document.may_take[each.key].json
  max_session_duration = 43200 # twelve hours: credentials are renewed in mid-run
}

data "aws_iam_policy_document" "may_do" {
  for_each = local.roles

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.store.arn]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for key in local.reads[each.key] : "${aws_s3_bucket.store.arn}/${local.root}${key}"]
  }

  dynamic "statement" {
    for_each = length(each.value.writes) == 0 ? [] : [1]
    content {
      sid       = "Write"
      actions   = ["s3:PutObject", "s3:AbortMultipartUpload"]
      resources = [for key in each.value.writes : "${aws_s3_bucket.store.arn}/${local.root}${key}"]
    }
  }

  dynamic "statement" {
    for_each = length(each.value.deletes) == 0 ? [] : [1]
    content {
      sid       = "Delete"
      actions   = ["s3:DeleteObject"]
      resources = [for key in each.value.deletes : "${aws_s3_bucket.store.arn}/${local.root}${key}"]
    }
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == "" ? [] : [1]
    content {
      sid       = "Key"
      actions   = length(each.value.writes) == 0 ? ["kms:Decrypt"] : ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [var.kms_key_arn]
    }
  }
}

resource "aws_iam_role_policy" "this" {
  for_each = local.roles
  name     = "store"
  role     = aws_iam_role.this[each.key].id
  policy   = data.aws_iam_policy_document.may_do[each.key].json
}
