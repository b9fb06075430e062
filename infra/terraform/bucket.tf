# The bucket that holds a store.
#
# No versioning: artifacts are written once under a name that says what is in them, so an older version is never wanted, while
# train states (20 GB each) come and go. Some servers other than AWS (Ceph) also stop honouring conditional writes on a bucket
# that has versions. What protects finished artifacts is the policy below.

resource "aws_s3_bucket" "store" {
  bucket        = var.bucket
  force_destroy = false

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_ownership_controls" "store" {
  bucket = aws_s3_bucket.store.id
  rule {
    object_ownership = "BucketOwnerEnforced" # no access lists: policies alone say who may what
  }
}

resource "aws_s3_bucket_public_access_block" "store" {
  bucket                  = aws_s3_bucket.store.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "store" {
  bucket = aws_s3_bucket.store.id
  rule {
    bucket_key_enabled = var.kms_key_arn != ""
    apply_server_side_encryption_by_default {
      sse_algorithm     = var.kms_key_arn == "" ? "AES256" : "aws:kms"
      kms_master_key_id = var.kms_key_arn == "" ? null : var.kms_key_arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "store" {
  bucket = aws_s3_bucket.store.id

  # Nothing else expires by age: what may go is known by `vc2 gc` alone.
  rule {
    id     = "uploads-of-the-dead"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  rule {
    id     = "probes"
    status = "Enabled"
    filter {
      prefix = "${local.root}probe/"
    }
    expiration {
      days = 1
    }
  }
}

data "aws_iam_policy_document" "store" {
  statement {
    sid       = "OnlyOverTls"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.store.arn, "${aws_s3_bucket.store.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  # The commit protocol, held by the bucket itself: whoever forgets If-None-Match, such as an operator with `aws s3 cp`,
  # cannot overwrite what says that an artifact is finished. `ObjectCreationOperation` lets the pieces of multipart uploads
  # pass, which know no condition.
  statement {
    sid       = "ManifestsAreWrittenOnce"
    effect    = "Deny"
    actions   = ["s3:PutObject"]
    resources = [for key in local.manifests : "${aws_s3_bucket.store.arn}/${local.root}${key}"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["true"]
    }
    condition {
      test     = "Bool"
      variable = "s3:ObjectCreationOperation"
      values   = ["true"]
    }
  }

  # Manifests of train states are not among these: a run removes its own old states.
  statement {
    sid       = "ManifestsStay"
    effect    = "Deny"
    actions   = ["s3:DeleteObject", "s3:DeleteObjectVersion"]
    resources = [for key in local.manifests : "${aws_s3_bucket.store.arn}/${local.root}${key}"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "ArnNotEquals"
      variable = "aws:PrincipalArn"
      values   = [aws_iam_role.this["gc"].arn]
    }
  }
}

resource "aws_s3_bucket_policy" "store" {
  bucket     = aws_s3_bucket.store.id
  policy     = data.aws_iam_policy_document.store.json
  depends_on = [aws_s3_bucket_public_access_block.store]
}
