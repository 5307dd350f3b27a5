"Images, folders of images, datasets, and the views of an image."
